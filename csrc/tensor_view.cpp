// Reading of torch's tensors, and the errors for those that do not fit.
#include "tensor_view.h"

#include <algorithm>

namespace presto_rt {
namespace {

constexpr std::int32_t kCpu = 1;  // DLPack's device type

// DLPackExchangeAPI of DLPack 1.x, the table of C functions of a tensor's type.
struct ExchangeApi {
  std::uint32_t major, minor;
  const ExchangeApi* older;
  void *allocate, *managed_from_object, *object_from_managed;
  int (*view_object)(void* object, DlTensor* out);  // borrows; -1 with a Python error set
  void* current_stream;
};

// Null where the object's type offers no such interface.
const ExchangeApi* exchange_api(py::handle object) {
  static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* const capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), name);
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // the table itself lives as long as the process
  if (!api) PyErr_Clear();
  while (api && api->major != 1) api = api->older;
  return api && api->view_object ? api : nullptr;
}

const char* dtype_name(Dtype dtype) {
  struct Named {
    Dtype dtype;
    const char* name;
  };
  static constexpr Named kNames[] = {
      {{0, 8}, "int8"},     {{0, 16}, "int16"},    {{0, 32}, "int32"},     {{0, 64}, "int64"},       {{1, 8}, "uint8"},
      {{1, 16}, "uint16"},  {{1, 32}, "uint32"},   {{1, 64}, "uint64"},    {{2, 16}, "float16"},     {{2, 32}, "float32"},
      {{2, 64}, "float64"}, {{4, 16}, "bfloat16"}, {{5, 64}, "complex64"}, {{5, 128}, "complex128"}, {{6, 8}, "bool"}};
  for (const Named& named : kNames)
    if (named.dtype == dtype) return named.name;
  return "another dtype";
}

// "(2, 5, 64)", as Python writes it.
std::string tuple(const std::int64_t* sizes, std::size_t count) {
  std::string text = "(";
  for (std::size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (count == 1 ? ",)" : ")");
}

}  // namespace

TensorView::TensorView(py::handle object) : object_(object) {
  if (object.is_none()) return;
  const ExchangeApi* const api = exchange_api(object);
  if (!api) return;
  is_tensor_ = api->view_object(object.ptr(), &tensor_) == 0;
  if (!is_tensor_) PyErr_Clear();  // a sparse one, say
}

bool TensorView::fits(Dtype dtype, Shape shape) const {
  return is_tensor_ && tensor_.device_type == kCpu && tensor_.lanes == 1 && tensor_.dtype == dtype &&
         tensor_.rank == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), tensor_.shape);
}

bool TensorView::is_contiguous() const {
  std::int64_t expected = 1;
  bool dense = true;
  for (int i = tensor_.rank - 1; i >= 0; --i) {
    if (tensor_.shape[i] == 0) return true;
    if (tensor_.shape[i] != 1 && tensor_.strides[i] != expected) dense = false;
    expected *= tensor_.shape[i];
  }
  return dense;
}

bool TensorView::is_bf16(const char* name) const {
  if (!is_tensor_ || !(tensor_.dtype == kFloat32 || tensor_.dtype == kBfloat16)) refuse(name, "float32 or bfloat16");
  return tensor_.dtype == kBfloat16;
}

std::int64_t TensorView::numel(const char* name) const {
  if (!is_tensor_) refuse(name, "a tensor");
  std::int64_t count = 1;
  for (int i = 0; i < tensor_.rank; ++i) count *= tensor_.shape[i];
  return count;
}

void* TensorView::any_shape(const char* name, Dtype dtype) const {
  if (!is_tensor_ || tensor_.device_type != kCpu || tensor_.lanes != 1 || !(tensor_.dtype == dtype) || !is_contiguous())
    refuse(name, std::string(dtype_name(dtype)) + ", contiguous");
  return address();
}

void* TensorView::rows(const char* name, Dtype dtype, Shape shape) const {
  const int last = static_cast<int>(shape.size()) - 1;
  if (!fits(dtype, shape) || (tensor_.shape[last] > 1 && tensor_.strides[last] != 1))
    refuse(name, describe(dtype, shape) + ", contiguous in the last dimension");
  return address();
}

std::string TensorView::describe(Dtype dtype, Shape shape) {
  return std::string(dtype_name(dtype)) + " " + tuple(shape.begin(), shape.size());
}

void TensorView::refuse(const char* name, const std::string& expected) const {
  std::string got;
  if (!object_ || object_.is_none()) {
    got = "None";
  } else if (!is_tensor_) {
    got = Py_TYPE(object_.ptr())->tp_name;
  } else {
    const auto rank = static_cast<std::size_t>(tensor_.rank);
    got = std::string(dtype_name(tensor_.dtype)) + " " + tuple(tensor_.shape, rank);
    if (!is_contiguous()) got += " with strides " + tuple(tensor_.strides, rank);
    if (tensor_.device_type != kCpu) got += ", not on the CPU";
  }
  throw py::value_error(std::string(name) + ": expected " + expected + "; got " + got);
}

}  // namespace presto_rt
