// Tensors as operators receive them: address, shape, strides, dtype and device of a torch.Tensor, read through DLPack's C
// interface (torch.Tensor.__dlpack_c_exchange_api__, torch >= 2.10) without linking torch. An operator asks each argument for
// what it needs. An argument that does not fit is a ValueError that names it, raised before any memory is touched.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <complex>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

namespace presto_rt {

namespace py = pybind11;

// A type of numbers: DLPack's code of its kind and its size in bits.
struct Dtype {
  std::uint8_t kind, bits;

  constexpr bool operator==(Dtype other) const { return kind == other.kind && bits == other.bits; }
};

constexpr Dtype kFloat32{2, 32}, kBfloat16{4, 16};

template <class T>
constexpr Dtype kDtypeOf{};
template <>
inline constexpr Dtype kDtypeOf<float> = kFloat32;
template <>
inline constexpr Dtype kDtypeOf<std::complex<float>>{5, 64};
template <>
inline constexpr Dtype kDtypeOf<std::int16_t>{0, 16};
template <>
inline constexpr Dtype kDtypeOf<std::int32_t>{0, 32};
template <>
inline constexpr Dtype kDtypeOf<std::uint8_t>{1, 8};
template <>
inline constexpr Dtype kDtypeOf<std::uint32_t>{1, 32};

// DLTensor of DLPack 1.x; strides count elements.
struct DlTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t rank;
  Dtype dtype;
  std::uint16_t lanes;
  const std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

// One argument of an operator: a tensor, None, or something else, which is refused when the operator asks for its data. The
// memory, the shape and the strides are the tensor's own, so a view must not outlive the call that received it.
class TensorView {
 public:
  using Shape = std::initializer_list<std::int64_t>;

  TensorView() = default;
  explicit TensorView(py::handle object);

  // False where the argument is None.
  explicit operator bool() const { return object_ && !object_.is_none(); }

  // Sizes of a tensor of kRank dimensions. Raises ValueError for anything else.
  template <std::size_t kRank>
  std::array<std::int64_t, kRank> shape(const char* name) const {
    if (!is_tensor_ || tensor_.rank != static_cast<int>(kRank)) refuse(name, "a tensor of rank " + std::to_string(kRank));
    std::array<std::int64_t, kRank> sizes;
    for (std::size_t i = 0; i < kRank; ++i) sizes[i] = tensor_.shape[i];
    return sizes;
  }

  // Distance in elements along a dimension. Only after `shape`, `data` or `rows` has accepted the tensor.
  std::int64_t stride(int dimension) const { return tensor_.strides[dimension]; }

  // True for bfloat16, false for float32, the dtypes of activations. Raises ValueError for anything else.
  bool is_bf16(const char* name) const;

  // True if this is a tensor of numbers of type T.
  template <class T>
  bool holds() const {
    return is_tensor_ && tensor_.dtype == kDtypeOf<T>;
  }

  // Address of a contiguous tensor of this dtype and shape in the CPU's memory. Raises ValueError for anything else.
  void* data(const char* name, Dtype dtype, Shape shape) const {
    if (!fits(dtype, shape) || !is_contiguous()) refuse(name, describe(dtype, shape) + ", contiguous");
    return address();
  }

  template <class T>
  T* data(const char* name, Shape shape) const {
    return static_cast<T*>(data(name, kDtypeOf<std::remove_const_t<T>>, shape));
  }

  // Address of a contiguous tensor of any shape; `numel` gives its size.
  template <class T>
  T* data(const char* name) const {
    return static_cast<T*>(any_shape(name, kDtypeOf<std::remove_const_t<T>>));
  }

  // Number of elements of a tensor of any rank.
  std::int64_t numel(const char* name) const;

  // The same as `data`, or null where the argument is None.
  void* data_or_null(const char* name, Dtype dtype, Shape shape) const { return *this ? data(name, dtype, shape) : nullptr; }

  template <class T>
  T* data_or_null(const char* name, Shape shape) const {
    return *this ? data<T>(name, shape) : nullptr;
  }

  // Address of a tensor whose last dimension alone must be contiguous; `stride` gives the others.
  void* rows(const char* name, Dtype dtype, Shape shape) const;

 private:
  void* any_shape(const char* name, Dtype dtype) const;
  bool fits(Dtype dtype, Shape shape) const;
  bool is_contiguous() const;
  void* address() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  static std::string describe(Dtype dtype, Shape shape);
  [[noreturn]] void refuse(const char* name, const std::string& expected) const;

  py::handle object_;
  bool is_tensor_ = false;
  DlTensor tensor_{};
};

}  // namespace presto_rt

namespace pybind11::detail {

// Accepts every object, so that the operator, which knows the argument's name, refuses what does not fit.
template <>
struct type_caster<presto_rt::TensorView> {
  PYBIND11_TYPE_CASTER(presto_rt::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = presto_rt::TensorView(source);
    return true;
  }
};

}  // namespace pybind11::detail
