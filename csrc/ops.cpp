// The module petl_kernels._C: what is no tensor op. The kernels of ops register themselves (cpu/kernel.h). The schema, the
// fake kernel and the autograd rule of each op stand in petl_kernels/ops, because a package built without a compiler
// needs them too.
#include <torch/extension.h>

#include "cpu/shared.h"
#include "host/build_info.h"
#include "host/cpu_allocator.h"
#include "host/launch_key.h"
#include "host/streaming.h"
#include "host/watch.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &petl::build_info, "How this extension was built: compiler, flags, PyTorch, CUDA.");
  m.def("constants", &petl::constants, "The constants that petl_kernels.ops has as well, by module and name.");
  m.def("install_cpu_allocator", &petl::install_cpu_allocator, "Count what tensors take on the CPU from now on.");
  m.def("cpu_bytes", &petl::cpu_bytes, "Bytes of CPU tensors allocated since the installation and not freed.");
  m.def("cpu_peak", &petl::cpu_peak, "The most of cpu_bytes since the installation or the last reset.");
  m.def("reset_cpu_peak", &petl::reset_cpu_peak, "Let cpu_peak start again from what is allocated now.");
  m.def("limit_cpu_bytes", &petl::limit_cpu_bytes, "Let allocations that go over this raise; 0 for no limit.");
  m.def("values", &petl::values, "The values of dictionaries, one after the other.");
  m.def("same_values", &petl::same_values, "Whether they are the very objects that `values` has returned.");
  m.def("stamps", &petl::stamps, "The versions and storages of tensors, to compare with later ones.");
  m.def("launch_key", &petl::launch_key, "What Triton compiles a kernel anew for, of its arguments.");
  petl::bind_streaming(m);
}
