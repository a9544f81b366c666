// Every C++ kernel of the package, by device. The schema, the fake kernel and the autograd rule of each op stand in
// petl_kernels/ops, because a package built without a compiler needs them too; backends/cpu.py connects the two.
#include <torch/extension.h>
#include <torch/library.h>

#include "cpu/kernels.h"
#include "cpu/product.h"
#include "host/build_info.h"
#include "host/cpu_allocator.h"
#include "host/launch_key.h"
#include "host/streaming.h"
#include "host/watch.h"

TORCH_LIBRARY(petl_cpu, m) {
  m.def("frozen_linear", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::frozen_linear)));
  m.def("frozen_linear_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::frozen_linear_backward)));
  m.def("lora_linear", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::lora_linear)));
  m.def("lora_linear_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::lora_linear_backward)));
  m.def("bottleneck_adapter", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::bottleneck_adapter)));
  m.def(
      "bottleneck_adapter_backward",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::bottleneck_adapter_backward)));
  m.def("attention", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::attention)));
  m.def("attention_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::attention_backward)));
  m.def("linear_cross_entropy", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::linear_cross_entropy)));
  m.def(
      "linear_cross_entropy_begin",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::linear_cross_entropy_begin)));
  m.def(
      "linear_cross_entropy_words",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::linear_cross_entropy_words)));
  m.def("linear_cross_entropy_end", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::linear_cross_entropy_end)));
  m.def("layer_norm", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::layer_norm)));
  m.def(
      "layer_norm_from_statistics",
      torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::layer_norm_from_statistics)));
  m.def("layer_norm_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::layer_norm_backward)));
  m.def("rms_norm", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::rms_norm)));
  m.def("rms_norm_from_statistics", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::rms_norm_from_statistics)));
  m.def("rms_norm_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::rms_norm_backward)));
  m.def("frozen_ffn", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::frozen_ffn)));
  m.def("frozen_ffn_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::frozen_ffn_backward)));
  m.def("dropout_add", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::dropout_add)));
  m.def("dropout_add_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::dropout_add_backward)));
  m.def("dropout_add_norm", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::dropout_add_norm)));
  m.def("dropout_add_norm_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::dropout_add_norm_backward)));
  m.def("activation", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::activation)));
  m.def("activation_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::activation_backward)));
  m.def("gated_activation", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::gated_activation)));
  m.def("gated_activation_backward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::gated_activation_backward)));
  m.def("product", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::product)));
  m.def("widens", TORCH_FN(petl::widens));
  m.def("quantize_int8", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::quantize_int8)));
  m.def("quantize_nf4", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::quantize_nf4)));
  m.def("dequantize", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::dequantize)));
  m.def("quantized_project", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::quantized_project)));
  m.def("quantized_project_back", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::quantized_project_back)));
  m.def("quantized_embedding", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(petl::quantized_embedding)));
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &petl::build_info, "How this extension was built: compiler, flags, PyTorch, CUDA.");
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
