// A device "cuda:0" whose memory is the CPU's. An operation runs the CPU's kernel, on aliases of its tensors: tensors of
// the CPU over the same memory. emulated_gpu.py compiles and registers it.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace at {
using namespace c10;

const Device cpu(DeviceType::CPU), gpu(DeviceType::CUDA, 0);

// ---- What autograd's engine and device guards ask of a device: that there is one, and that switching does nothing.

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
};

struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
};
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, REGISTRY_PREFERRED, CUDAHooks)

// ---- Memory, and aliases.

struct Memory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    auto* held = new DataPtr(GetCPUAllocator()->allocate(bytes));
    return DataPtr(held->get(), held, [](void* p) { delete static_cast<DataPtr*>(p); }, gpu);
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;

Tensor alias(const Tensor& tensor, Device device) {
  const Storage& storage = tensor.storage();
  auto* held = new Storage(storage);  // keeps the memory
  DataPtr data(const_cast<void*>(storage.data()), held, [](void* p) { delete static_cast<Storage*>(p); }, device);
  Allocator* allocator = device == cpu ? GetCPUAllocator() : &memory;
  Storage same(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true);
  DispatchKeySet keys(device == cpu ? DispatchKey::CPU : DispatchKey::CUDA);
  Tensor out = detail::make_tensor<TensorImpl>(std::move(same), keys, tensor.dtype());
  auto* impl = out.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return out;
}

Tensor on_cpu(const Tensor& tensor) { return tensor.defined() && tensor.is_cuda() ? alias(tensor, cpu) : tensor; }

// ---- Any operation that has no kernel of its own below.

struct Aliases {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // a tensor on the device, and its alias

  Tensor down(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (auto& [theirs, ours] : pairs)
      if (theirs.is_same(tensor)) return ours;
    return pairs.emplace_back(tensor, alias(tensor, cpu)).second;
  }
  Tensor up(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (auto& [theirs, ours] : pairs)
      if (ours.is_same(tensor)) return theirs;
    return alias(tensor, gpu);
  }
  IValue down(const IValue& value) {
    if (value.isTensor()) return down(value.toTensor());
    if (value.isTensorList()) {
      List<Tensor> list;
      for (const Tensor& each : value.toTensorVector()) list.push_back(down(each));
      return list;
    }
    if (value.isOptionalTensorList()) {
      List<std::optional<Tensor>> list;
      for (std::optional<Tensor> each : value.toOptionalTensorList())
        list.push_back(each ? std::optional<Tensor>(down(*each)) : each);
      return list;
    }
    return value.isDevice() ? IValue(cpu) : value;
  }
  IValue up(const IValue& value) {
    if (value.isTensor()) return up(value.toTensor());
    if (!value.isTensorList()) return value;
    List<Tensor> list;
    for (const Tensor& each : value.toTensorVector()) list.push_back(up(each));
    return list;
  }
  // Tensors that the operation has resized, as out= does.
  void follow() {
    for (auto& [theirs, ours] : pairs) {
      auto* impl = theirs.unsafeGetTensorImpl();
      if (theirs.storage().data() != ours.storage().data()) impl->set_storage_keep_dtype(alias(ours, gpu).storage());
      if (theirs.sizes() != ours.sizes() || theirs.strides() != ours.strides())
        impl->set_sizes_and_strides(ours.sizes(), ours.strides(), ours.storage_offset());
    }
  }
};

void any_operation(const OperatorHandle& operation, DispatchKeySet, torch::jit::Stack* stack) {
  Aliases aliases;
  bool to_cpu = false;
  const size_t arguments = operation.schema().arguments().size(), returns = operation.schema().returns().size();
  for (size_t i = stack->size() - arguments; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    to_cpu |= value.isDevice() && value.toDevice().is_cpu();
    value = aliases.down(value);
  }
  operation.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  aliases.follow();
  for (size_t i = stack->size() - returns; i < stack->size() && !to_cpu; i++) (*stack)[i] = aliases.up((*stack)[i]);
}

// ---- Those that make tensors, or views, or cross over.

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  DispatchKeySet keys(DispatchKey::CUDA);
  return detail::empty_generic(size, &memory, keys, dtype_or_default(dtype), format);
}
Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  DispatchKeySet keys(DispatchKey::CUDA);
  return detail::empty_strided_generic(size, stride, &memory, keys, dtype_or_default(dtype));
}
Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  on_cpu(target).copy_(on_cpu(source));
  return target;
}
Tensor& copy_into(Tensor& target, const Tensor& source, bool) {
  on_cpu(target).copy_(on_cpu(source));
  return target;
}
Scalar item(const Tensor& tensor) { return on_cpu(tensor).item(); }

extern "C" void register_device() {
  static c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());
  SetAllocator(DeviceType::CUDA, &memory);
  using torch::Library;
  static Library all(Library::IMPL, "_", DispatchKey::CUDA, __FILE__, __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&any_operation>());
  static Library aten(Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  aten.impl("empty.memory_format", TORCH_FN(empty));
  aten.impl("empty_strided", TORCH_FN(empty_strided));
  aten.impl("as_strided", TORCH_FN(as_strided));
  aten.impl("view", TORCH_FN(native::view));
  aten.impl("unfold", TORCH_FN(native::unfold));
  aten.impl("_reshape_alias", TORCH_FN(native::_reshape_alias));
  aten.impl("copy_", TORCH_FN(copy_into));
  aten.impl("_copy_from", TORCH_FN(copy_from));
  aten.impl("_local_scalar_dense", TORCH_FN(item));
}
}  // namespace at
