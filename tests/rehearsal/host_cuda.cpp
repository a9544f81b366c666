// A CUDA device in host memory, for a PyTorch that was built without CUDA.
//
// Tensors of device cuda:0 are real ones: the dispatcher, autograd, autocast and every check of devices treat them as on a
// card. Their bytes are in host memory, and each operator of theirs runs the CPU's kernel over those same bytes. What is
// allocated is counted, and refused above a limit, as CUDA's caching allocator does under a memory fraction.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

const c10::Device CARD(c10::DeviceType::CUDA, 0);

// ------------------------------------------------------------------------------------------------ memory

std::atomic<int64_t> allocated{0}, peak{0}, limit{std::numeric_limits<int64_t>::max()};

struct Owner {  // of the host storage behind a storage of the card
  c10::Storage host;
  int64_t bytes;
};

void release(void* context) {
  auto* owner = static_cast<Owner*>(context);
  allocated -= owner->bytes;
  delete owner;
}

c10::DataPtr on_card(const c10::Storage& host) {
  const auto bytes = static_cast<int64_t>(host.nbytes());
  if (allocated + bytes > limit)
    C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " + std::to_string(bytes) + " bytes of " +
        std::to_string(limit - allocated) + " that are left of the memory fraction");
  allocated += bytes;
  peak = std::max(peak.load(), allocated.load());
  return c10::DataPtr(host.mutable_data(), new Owner{host, bytes}, release, CARD);
}

void keep(void*) {}

// ------------------------------------------------------------------------------------------------ views of one memory

struct Pair {
  at::Tensor card, host;
  void* data;  // of the host storage when it was made: another one afterwards tells that the kernel has resized it
};

at::Tensor shaped(at::Tensor made, const at::Tensor& like) {
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.dim() == 0) impl->set_wrapped_number(like.unsafeGetTensorImpl()->is_wrapped_number());
  return made;
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  return shaped(
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype()), like);
}

at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {  // a normal tensor's are normal in inference mode
  return shaped(at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), like.dtype()), like);
}

class Call {  // of one operator: its tensors on the card and those that the CPU's kernel sees in their place
 public:
  at::Tensor to_host(const at::Tensor& card) {
    if (!card.defined() || !card.is_cuda()) return card;
    for (auto& known : pairs_)
      if (known.card.is_same(card)) return known.host;
    auto* data = card.storage().mutable_data();
    c10::Storage storage;
    for (auto& known : pairs_)  // views of one memory stay views of one memory
      if (known.card.storage().is_alias_of(card.storage())) storage = known.host.storage();
    if (!storage)
      storage = c10::Storage(c10::Storage::use_byte_size_t(), card.storage().nbytes(),
          c10::DataPtr(data, nullptr, keep, c10::Device(c10::kCPU)), c10::GetCPUAllocator(), /*resizable=*/true);
    pairs_.push_back({card, over(storage, c10::DispatchKey::CPU, card), data});
    return pairs_.back().host;
  }

  at::Tensor to_card(const at::Tensor& host) {
    if (!host.defined() || !host.is_cpu()) return host;
    for (auto& known : pairs_)
      if (known.host.is_same(host)) return known.card;
    for (auto& known : pairs_)
      if (known.host.storage().is_alias_of(host.storage()))
        return view_of(known.card, host);
    return over(c10::Storage(c10::Storage::use_byte_size_t(), host.storage().nbytes(), on_card(host.storage()), nullptr,
        /*resizable=*/false), c10::DispatchKey::CUDA, host);
  }

  void adopt_resized() {  // results written to tensors that were given, which the kernel has made larger
    for (auto& pair : pairs_) {
      auto& storage = pair.host.storage();
      if (storage.mutable_data() != pair.data) {
        pair.card.storage().set_data_ptr(on_card(storage));
        pair.card.storage().set_nbytes(storage.nbytes());
      }
      if (pair.card.sizes() != pair.host.sizes() || pair.card.strides() != pair.host.strides())
        pair.card.unsafeGetTensorImpl()->set_sizes_and_strides(
            pair.host.sizes(), pair.host.strides(), pair.host.storage_offset());
    }
  }

  bool card_seen() const { return !pairs_.empty(); }

 private:
  std::vector<Pair> pairs_;
};

template <class Convert>
void convert_tensors(c10::IValue& value, Convert convert) {
  if (value.isTensor()) {
    value = convert(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& tensor : list) tensor = convert(tensor);
    value = c10::List<at::Tensor>(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional<at::Tensor>(convert(*tensor)) : std::nullopt);
    value = list;
  }
}

// ------------------------------------------------------------------------------------------------ the operators

const std::set<std::string> TAKES_BOTH_DEVICES = {  // as on a card: copies, and indices from the host
    "aten::copy_", "aten::_copy_from", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put", "aten::set_.source_Tensor",
    "aten::_fused_adamw_", "aten::_fused_adam_"};

std::atomic<bool> has_refused{false};  // since it was last looked at
std::atomic<bool> waiting_refused{false};  // while a stream is captured, and by torch.cuda.set_sync_debug_mode("error")

bool waits_for_the_card(const std::string& name, const torch::jit::Stack& stack, size_t arguments) {
  if (name == "aten::copy_") {
    const auto& to = stack[stack.size() - arguments].toTensor();
    const auto& from = stack[stack.size() - arguments + 1].toTensor();
    const bool non_blocking = stack.back().toBool();
    if (to.is_cpu() == from.is_cpu()) {
      return false;
    }
    return !(non_blocking && (to.is_cpu() ? to : from).is_pinned());
  }
  return name == "aten::_local_scalar_dense" || name == "aten::nonzero" || name == "aten::masked_select";
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(op.operator_name());
  if (waiting_refused && waits_for_the_card(name, *stack, schema.arguments().size())) {
    has_refused = true;
    TORCH_CHECK(false, name, ": called a synchronizing CUDA operation");
  }
  Call call;
  bool wants_card = false, on_the_host = false;
  auto to_host = [&](const at::Tensor& tensor) {
    on_the_host |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;
    return call.to_host(tensor);
  };
  for (size_t i = stack->size() - schema.arguments().size(); i < stack->size(); ++i) {
    auto& argument = (*stack)[i];
    convert_tensors(argument, to_host);
    if (argument.isDevice()) {
      wants_card |= argument.toDevice().is_cuda();
      argument = c10::Device(c10::kCPU);
    }
  }
  TORCH_CHECK(!(on_the_host && call.card_seen()) || TAKES_BOTH_DEVICES.count(name), name,
      ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
  {
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset_with_ADInplaceOrView |
        c10::autocast_dispatch_keyset | c10::python_ks);
    op.callBoxed(stack);
  }
  call.adopt_resized();
  if (!call.card_seen() && !wants_card) return;
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    convert_tensors((*stack)[i], [&](const at::Tensor& tensor) { return call.to_card(tensor); });
}

int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
    double, bool, std::optional<double>, bool) {
  return 0;  // the plain products: the others are kernels of a card
}

void record_stream(at::Tensor&, c10::Stream) {}

at::Tensor& set_part(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_part(self, std::move(source), 0, {count}, {1});
}

using Boxed = torch::CppFunction;
Boxed boxed() { return Boxed::makeFromBoxedFunction<&run_on_host>(); }

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(boxed()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", boxed());  // PyTorch's own takes kernels by device beside the dispatcher
  library.impl("_fused_sdp_choice", fused_sdp_choice);
  library.impl("record_stream", record_stream);
  library.impl("set_.source_Storage", set_whole);
  library.impl("set_.source_Storage_storage_offset", set_part);
}

// ------------------------------------------------------------------------------------------------ one device, one stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override { setDevice(device); return CARD; }
  c10::Device getDevice() const override { return CARD; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() <= 0, "CUDA error: invalid device ordinal ", device.index());
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, CARD); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(CARD); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(CARD); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// ------------------------------------------------------------------------------------------------ pinned memory

std::mutex pinning;
std::map<const char*, size_t> pinned;
std::atomic<int64_t> times_pinned{0};

void unpin(void* data) {
  std::lock_guard<std::mutex> lock(pinning);
  pinned.erase(static_cast<char*>(data));
  c10::GetCPUAllocator()->raw_deallocate(data);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::GetCPUAllocator()->raw_allocate(size) : nullptr;
    std::lock_guard<std::mutex> lock(pinning);
    if (data) pinned[static_cast<char*>(data)] = size, ++times_pinned;
    return {data, data, data ? unpin : keep, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

// ------------------------------------------------------------------------------------------------ what PyTorch looks up

struct CUDAHooks final : at::CUDAHooksInterface {  // the name is the key under which PyTorch finds it
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinning);
    const auto* byte = static_cast<const char*>(data);
    auto above = pinned.upper_bound(byte);
    return above != pinned.begin() && byte < std::prev(above)->first + std::prev(above)->second;
  }
};

using at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace

extern "C" {
int64_t card_allocated() { return allocated; }
int64_t card_peak() { return peak; }
void card_reset_peak() { peak = allocated.load(); }
void card_limit(int64_t bytes) { limit = bytes; }
int64_t card_times_pinned() { return times_pinned; }
void card_refuse_waiting(bool refused) { waiting_refused = refused; }

bool card_has_refused() { return has_refused.exchange(false); }
}
