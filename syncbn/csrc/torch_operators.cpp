// Eager mode's way to the kernels: two operators of torch's, each all of one direction, for plain dense CPU tensors.
//
// What is not plain (another device or layout, gaps, float64 input, vectors of other dtypes, no elements) is declined
// before anything is done, and takes the general way in Python, which also finds the words for what is wrong.
//
// Built without torch: its stable C interface, which operators are written in, is looked up in the loaded library. Where
// a version of torch lacks it, nothing is registered and the general way serves everything.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "syncbn_cpu.h"
#include "shared_memory.h"

namespace {

using Value = std::uint64_t;  // StableIValue: an argument or a result of an operator
struct TensorObject;
using Handle = TensorObject*;
struct LibraryObject;
using Library = LibraryObject*;

struct {
  std::int32_t (*init_fragment)(const char*, const char*, std::uint32_t, Library*);
  std::int32_t (*init_impl)(const char*, const char*, const char*, std::uint32_t, Library*);
  std::int32_t (*define)(Library, const char*);
  std::int32_t (*impl)(Library, const char*, void (*)(Value*, std::uint64_t, std::uint64_t));
  std::int32_t (*get_data_ptr)(Handle, void**);
  std::int32_t (*get_dim)(Handle, std::int64_t*);
  std::int32_t (*get_sizes)(Handle, std::int64_t**);
  std::int32_t (*get_strides)(Handle, std::int64_t**);
  std::int32_t (*get_dtype)(Handle, std::int32_t*);
  std::int32_t (*get_device_type)(Handle, std::int32_t*);
  std::int32_t (*empty_strided)(std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t, std::int32_t,
                                std::int32_t, Handle*);
  std::int32_t (*copy_handle)(Handle, Handle*);
  std::int32_t (*delete_handle)(Handle);
  std::int32_t cpu, float64, float32, bfloat16, float16, int64, boolean;
} torch_api;

constexpr int kMaxDim = 8;
constexpr long kHugeBytes = 4'000'000;  // see kernels/memory.py
constexpr double kDeclined = -1, kUnsent = -2;  // in place of a count

Handle handle(Value v) { return reinterpret_cast<Handle>(v); }
Value value(Handle v) { return reinterpret_cast<Value>(v); }
Value value(double v) {
  Value bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
double real(Value v) {
  double bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

void* data_of(Handle v) {
  void* data = nullptr;
  torch_api.get_data_ptr(v, &data);
  return data;
}

int code_of(std::int32_t dtype) {
  return dtype == torch_api.float32    ? kFloat32
         : dtype == torch_api.bfloat16 ? kBfloat16
         : dtype == torch_api.float16  ? kFloat16
         : dtype == torch_api.float64  ? kFloat64
                                       : -1;
}

// A dense CPU tensor of some dtype, contiguous or channels last, or what is_plain says is none.
struct Batch {
  Handle tensor;
  std::int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  std::int64_t dense[kMaxDim];  // the strides of a dense tensor of this memory format
  std::int32_t dtype = 0;
  void* data = nullptr;
  long n = 0, c = 0, s = 0, elements = 0;
  bool is_plain = false;

  explicit Batch(Handle t) : tensor(t) {
    std::int32_t device = -1;
    torch_api.get_device_type(t, &device);
    torch_api.get_dim(t, &dim);
    if (device != torch_api.cpu || dim < 2 || dim > kMaxDim) return;
    torch_api.get_sizes(t, &sizes), torch_api.get_strides(t, &strides), torch_api.get_dtype(t, &dtype);
    c = sizes[1];
    long spatial = 1;
    for (int i = 2; i < dim; ++i) spatial *= sizes[i];
    elements = sizes[0] * c * spatial;
    if (elements == 0) return;
    fill_strides(false);
    const bool is_contiguous = has_strides(dense);
    if (!is_contiguous) {
      fill_strides(true);
      if (!has_strides(dense)) return;
    }
    n = is_contiguous ? sizes[0] : sizes[0] * spatial;
    s = is_contiguous ? spatial : 1;
    torch_api.get_data_ptr(t, &data);
    is_plain = data != nullptr;
  }

  void fill_strides(bool channels_last) {
    std::int64_t step = channels_last ? c : 1;
    for (int i = int(dim) - 1; i >= 2; --i) dense[i] = step, step *= sizes[i];
    dense[1] = channels_last ? 1 : step;
    dense[0] = channels_last ? step : step * c;
  }

  // Strides of axes of one element say nothing.
  bool has_strides(const std::int64_t* expected) const {
    for (int i = 0; i < dim; ++i)
      if (sizes[i] != 1 && strides[i] != expected[i]) return false;
    return true;
  }

  // Whether the other has this shape, dtype and memory format.
  bool matches(const Batch& other) const {
    if (!other.is_plain || other.dim != dim || other.dtype != dtype) return false;
    return std::memcmp(other.sizes, sizes, dim * sizeof(std::int64_t)) == 0 && other.has_strides(dense);
  }

  Handle empty_like() const {
    Handle y = nullptr;
    torch_api.empty_strided(dim, sizes, dense, dtype, torch_api.cpu, 0, &y);
    const long bytes = elements * (dtype == torch_api.float32 ? 4 : 2);
    if (bytes >= kHugeBytes) syncbn_prefer_huge_pages(data_of(y), bytes);
    return y;
  }
};

// A dense CPU vector, or none: kernels/fused.py's NONE, an int64 vector of no elements, stands for what is not there.
struct Vector {
  Handle tensor;
  std::int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  std::int32_t dtype = 0;
  void* data = nullptr;

  explicit Vector(Value v) : tensor(handle(v)) {
    std::int32_t device = -1;
    torch_api.get_device_type(tensor, &device);
    if (device != torch_api.cpu) {
      dim = -1;
      return;
    }
    torch_api.get_dim(tensor, &dim), torch_api.get_sizes(tensor, &sizes);
    torch_api.get_strides(tensor, &strides), torch_api.get_dtype(tensor, &dtype);
    torch_api.get_data_ptr(tensor, &data);
  }
  bool is_none() const { return dim == 1 && sizes[0] == 0 && dtype == torch_api.int64; }
  void* address() const { return is_none() ? nullptr : data; }
  bool is_of(long c) const { return dim == 1 && sizes[0] == c && (c == 1 || strides[0] == 1) && data; }
  bool are_sums_of(long length) const { return dtype == torch_api.float64 && is_of(length); }
  bool is_float_of(long c) const { return is_none() || (dtype == torch_api.float32 && is_of(c)); }
};

// A dense mask, (N, 1, ...), or none, as of Vector.
struct PositionMask {
  Vector v;
  explicit PositionMask(Value value) : v(value) {}
  bool is_none() const { return v.is_none(); }
  // Whether it is none, or one of x.
  bool fits(const Batch& x) const {
    if (is_none()) return true;
    if (v.dim != x.dim || v.dtype != torch_api.boolean || !v.data) return false;
    std::int64_t step = 1;
    for (int i = int(v.dim) - 1; i >= 0; --i) {
      if (v.sizes[i] != (i == 1 ? 1 : x.sizes[i]) || (v.sizes[i] != 1 && v.strides[i] != step)) return false;
      step *= v.sizes[i];
    }
    return true;
  }
  const std::uint8_t* bytes() const { return is_none() ? nullptr : static_cast<const std::uint8_t*>(v.data); }
};

Handle new_vector(std::int64_t length, std::int32_t dtype) {
  const std::int64_t one = 1;
  Handle v = nullptr;
  torch_api.empty_strided(1, &length, &one, dtype, torch_api.cpu, 0, &v);
  return v;
}

Handle again(Handle v) {
  Handle copy = nullptr;
  torch_api.copy_handle(v, &copy);
  return copy;
}

// How this rank's sums get to the others: not at all (a world of one), in shared memory, or by the caller.
constexpr std::int64_t kAlone = 0, kByCaller = -1;

// Returns whether the sums of all ranks are there.
bool send(std::int64_t how, double* buffer, long length) {
  if (how == kAlone) return true;
  if (how == kByCaller) return false;
  auto& shared = *reinterpret_cast<SharedSum*>(how);
  shared.result = shared.sum(&shared, buffer, length);
  return shared.result == -1;
}

// Deletes the arguments, which an operator owns, and puts the results in their place.
template <int kTensors, int kResults>
void finish(Value* stack, const Value (&results)[kResults]) {
  for (int i = 0; i < kTensors; ++i) torch_api.delete_handle(handle(stack[i]));
  for (int i = 0; i < kResults; ++i) stack[i] = results[i];
}

constexpr char kForward[] =
    "eager_forward(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor mask, Tensor running_mean, "
    "Tensor running_var, Tensor num_batches_tracked, Tensor moments, float momentum, float eps, int activation, float slope, int send) -> "
    "(Tensor, Tensor, float)";

// Returns y, statistics and the count. Declined: the count is kDeclined. Where the sums are still to be sent it is
// kUnsent, and the statistics are this rank's moments: called again with those of all ranks as `moments`, it goes on.
void eager_forward(Value* stack, std::uint64_t, std::uint64_t) {
  const Batch x(handle(stack[0])), residual(handle(stack[3]));
  const Vector weight(stack[1]), bias(stack[2]), mean(stack[5]), var(stack[6]), moments(stack[8]);
  const PositionMask mask(stack[4]);
  const int code = x.is_plain ? code_of(x.dtype) : -1;
  const bool has_residual = !Vector(stack[3]).is_none();
  void* batches = nullptr;
  bool is_plain = code > kFloat64 && weight.is_float_of(x.c) && bias.is_float_of(x.c) &&
                  (!has_residual || x.matches(residual)) && mask.fits(x) &&
                  (mean.is_none() ? var.is_none()
                                  : mean.is_of(x.c) && var.is_of(x.c) && mean.dtype == var.dtype &&
                                        code_of(mean.dtype) >= 0) &&
                  (moments.is_none() || moments.are_sums_of(2 * x.c + 1));
  if (is_plain) {
    std::int32_t dtype = -1, device = -1;
    std::int64_t dim = -1, *sizes = nullptr;
    const Handle counter = handle(stack[7]);
    torch_api.get_device_type(counter, &device), torch_api.get_dim(counter, &dim);
    torch_api.get_dtype(counter, &dtype), torch_api.get_sizes(counter, &sizes);
    if (dim == 0) batches = data_of(counter);
    is_plain = device == torch_api.cpu && (batches ? dtype == torch_api.int64 : dim == 1 && sizes[0] == 0);
  }
  if (!is_plain) {
    return finish<9>(stack, {value(again(x.tensor)), value(again(x.tensor)), value(kDeclined)});
  }
  const bool goes_on = !moments.is_none();
  const Handle statistics = goes_on ? again(moments.tensor) : new_vector(2 * x.c + 1, torch_api.float64);
  double* const sums = static_cast<double*>(data_of(statistics));
  if (!goes_on) {
    syncbn_stats(code, x.n, x.c, x.s, x.data, mask.bytes(), nullptr, sums);
    if (!send(std::int64_t(stack[13]), sums, 2 * x.c + 1))
      return finish<9>(stack, {value(again(x.tensor)), value(statistics), value(kUnsent)});
  }
  const Handle y = x.empty_like();
  void* const out = data_of(y);
  const double count = syncbn_normalise(
      code, x.n, x.c, x.s, x.data, has_residual ? residual.data : nullptr, out, mask.bytes(), sums, nullptr,
      weight.address(), bias.address(), mean.address(), var.address(), static_cast<std::int64_t*>(batches),
      mean.is_none() ? 0 : code_of(mean.dtype), real(stack[9]), real(stack[10]), int(stack[11]), real(stack[12]), 0.0);
  finish<9>(stack, {value(y), value(statistics), value(count)});
}

constexpr char kBackward[] =
    "eager_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor gate, Tensor mask, Tensor statistics, "
    "Tensor sums, bool has_bias, int activation, float slope, int send) -> (Tensor, Tensor, Tensor, Tensor, float)";

// Returns dx, the gradients of weight and bias, g, and 0. Declined or unsent as eager_forward: unsent, this rank's sums
// are in dx's place; called again with those of all ranks as `sums`, it computes dx alone. What there is not is some other tensor.
void eager_backward(Value* stack, std::uint64_t, std::uint64_t) {
  const Batch dy(handle(stack[0])), x(handle(stack[1])), gate(handle(stack[4]));
  const Vector weight(stack[2]), bias(stack[3]), statistics(stack[6]), given(stack[7]);
  const PositionMask mask(stack[5]);
  const int code = x.is_plain ? code_of(x.dtype) : -1;
  const bool has_gate = !Vector(stack[4]).is_none(), has_bias = stack[8] & 1;
  const auto nothing = [&] { return value(again(x.tensor)); };
  if (!(code > kFloat64 && x.matches(dy) && weight.is_float_of(x.c) && bias.is_float_of(x.c) &&
        (!has_gate || x.matches(gate)) && mask.fits(x) && statistics.are_sums_of(2 * x.c + 1) &&
        (given.is_none() || given.are_sums_of(2 * x.c))))
    return finish<8>(stack, {nothing(), nothing(), nothing(), nothing(), value(kDeclined)});
  int activation = int(stack[9]);
  const double slope = real(stack[10]);
  const auto* const of_all = static_cast<const double*>(statistics.data);
  const bool goes_on = !given.is_none();
  Handle g = nullptr, grad_weight = nullptr, grad_bias = nullptr, kept = nullptr;
  std::vector<double> local;
  const double* sums = static_cast<const double*>(given.data);
  const void* gradient = dy.data;
  if (!goes_on) {
    if (has_gate) g = x.empty_like();
    if (!weight.is_none()) grad_weight = new_vector(x.c, torch_api.float32);
    if (has_bias) grad_bias = new_vector(x.c, torch_api.float32);
    const auto how = std::int64_t(stack[11]);
    double* own;
    if (how == kAlone) {
      local.resize(2 * x.c), own = local.data();
    } else {  // kept for the caller, should it have to go on
      kept = new_vector(2 * x.c, torch_api.float64), own = static_cast<double*>(data_of(kept));
    }
    syncbn_backward_reduce(code, x.n, x.c, x.s, dy.data, x.data, has_gate ? gate.data : nullptr,
                           g ? data_of(g) : nullptr, mask.bytes(), of_all, weight.address(), bias.address(),
                           grad_weight ? data_of(grad_weight) : nullptr, grad_bias ? data_of(grad_bias) : nullptr, own,
                           activation, slope, 0.0);
    sums = own;
    if (g) gradient = data_of(g), activation = kNone;  // dy went through the activation already
    if (!send(how, own, 2 * x.c))
      return finish<8>(stack, {value(kept), grad_weight ? value(grad_weight) : nothing(),
                               grad_bias ? value(grad_bias) : nothing(), g ? value(g) : nothing(), value(kUnsent)});
  }
  const Handle dx = x.empty_like();
  void* const out = data_of(dx);
  syncbn_backward_elemt(code, x.n, x.c, x.s, gradient, x.data, out, mask.bytes(), of_all, weight.address(), bias.address(), sums,
                        activation, slope, 0.0);
  if (kept) torch_api.delete_handle(kept);
  finish<8>(stack, {value(dx), grad_weight ? value(grad_weight) : nothing(), grad_bias ? value(grad_bias) : nothing(),
                    g ? value(g) : nothing(), value(0.0)});
}

template <class F> bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

// Registers the operators; libtorch is the path of torch's loaded library. Returns 0, or what failed: 1 the library is
// not loaded, 2 it has no such C interface, 3 it refuses the operators.
SYNCBN_API int syncbn_register_operators(const char* libtorch) {
  void* const library = dlopen(libtorch, RTLD_NOW | RTLD_NOLOAD);
  if (!library) return 1;
  auto& api = torch_api;
  std::int32_t (*cpu)(), (*float64)(), (*float32)(), (*bfloat16)(), (*float16)(), (*int64)(), (*boolean)();
  if (!(find(library, "aoti_torch_library_init_fragment", api.init_fragment) &&
        find(library, "aoti_torch_library_init_impl", api.init_impl) &&
        find(library, "aoti_torch_library_def", api.define) && find(library, "aoti_torch_library_impl", api.impl) &&
        find(library, "aoti_torch_get_data_ptr", api.get_data_ptr) &&
        find(library, "aoti_torch_get_dim", api.get_dim) && find(library, "aoti_torch_get_sizes", api.get_sizes) &&
        find(library, "aoti_torch_get_strides", api.get_strides) &&
        find(library, "aoti_torch_get_dtype", api.get_dtype) &&
        find(library, "aoti_torch_get_device_type", api.get_device_type) &&
        find(library, "aoti_torch_empty_strided", api.empty_strided) &&
        find(library, "aoti_torch_new_tensor_handle", api.copy_handle) &&
        find(library, "aoti_torch_delete_tensor_object", api.delete_handle) &&
        find(library, "aoti_torch_device_type_cpu", cpu) && find(library, "aoti_torch_dtype_float64", float64) &&
        find(library, "aoti_torch_dtype_float32", float32) && find(library, "aoti_torch_dtype_bfloat16", bfloat16) &&
        find(library, "aoti_torch_dtype_float16", float16) && find(library, "aoti_torch_dtype_int64", int64) &&
        find(library, "aoti_torch_dtype_bool", boolean)))
    return 2;
  api.cpu = cpu(), api.float64 = float64(), api.float32 = float32(), api.bfloat16 = bfloat16();
  api.float16 = float16(), api.int64 = int64(), api.boolean = boolean();
  Library definitions = nullptr, implementations = nullptr;
  const bool is_registered = !api.init_fragment("syncbn", __FILE__, __LINE__, &definitions) &&
                             !api.define(definitions, kForward) && !api.define(definitions, kBackward) &&
                             !api.init_impl("syncbn", "CPU", __FILE__, __LINE__, &implementations) &&
                             !api.impl(implementations, "eager_forward", eager_forward) &&
                             !api.impl(implementations, "eager_backward", eager_backward);
  return is_registered ? 0 : 3;
}
