// Batch normalisation and ReLU over the joined pieces of a dense block, for CPUs: what TensorFlow does in four
// passes over memory (join, statistics, normalise, ReLU; more of them backwards) in one each way.
//
// A piece is one of the tensors that a dense block joins, (N, H, W, C_p). Its statistics are the same for every
// layer that reads it, so `WorkbenchMoments` computes them once, and `WorkbenchNormRelu` takes any number of pieces
// with their statistics, and joins them while it writes the result. Both also pass the pieces on (the same memory)
// to the next reader, so that backwards each adds its gradient to that of the later ones while it is at it.
//
// `fast.py` uses both, and its tests hold them to plain Keras. Sums are taken over a fixed number of stripes of rows,
// in float within a block of rows and in double over them, and are added in order: results do not depend on the number
// of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/lib/core/threadpool.h"

using namespace tensorflow;

namespace {

constexpr int64_t kStripes = 64;
constexpr int64_t kBlock = 64;  // rows whose sums are taken in float

// Sixteen channels at a time, whatever the processor's width: the compiler makes of it what there is.
constexpr int kLanes = 16;
constexpr int kWide = 32;  // channels that are summed side by side: one or two cache lines
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Lanes Load(const float* x) {
  Lanes value;
  std::memcpy(&value, x, sizeof(value));
  return value;
}
inline Lanes Load(const bfloat16* x) {
  Halves half;
  std::memcpy(&half, x, sizeof(half));
  return (Lanes)(__builtin_convertvector(half, Bits) << 16);
}
inline void Store(Lanes value, float* y) { std::memcpy(y, &value, sizeof(value)); }
inline void Store(Lanes value, bfloat16* y) {  // rounds to nearest, ties to even
  const Bits bits = (Bits)value;
  const Halves half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
  std::memcpy(y, &half, sizeof(half));
}

// The same for the last channels of a row, which may be fewer than a vector holds.
template <typename T>
inline Lanes LoadSome(const T* x, int64_t count) {
  if (count >= kLanes) return Load(x);
  T padded[kLanes] = {};
  std::copy(x, x + count, padded);
  return Load(padded);
}
template <typename T>
inline void StoreSome(Lanes value, T* y, int64_t count) {
  if (count >= kLanes) return Store(value, y);
  T padded[kLanes];
  Store(value, padded);
  std::copy(padded, padded + count, y);
}

// Calls work(stripe, first row, last row) for every stripe, on TensorFlow's own threads.
template <typename Work>
void ForStripes(OpKernelContext* context, int64_t rows, int64_t channels, Work work) {
  auto* workers = context->device()->tensorflow_cpu_worker_threads()->workers;
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) work(s, s * rows / kStripes, (s + 1) * rows / kStripes);
  };
  workers->ParallelFor(kStripes, std::max<int64_t>(1, rows * channels / kStripes), run);
}

// Adds up what the stripes left: (kStripes, n) -> (n).
std::vector<double> AddStripes(const std::vector<double>& parts, int64_t n) {
  std::vector<double> sums(n, 0.0);
  for (int64_t s = 0; s < kStripes; ++s)
    for (int64_t i = 0; i < n; ++i) sums[i] += parts[s * n + i];
  return sums;
}

// x (..., C) -> (2, C): mean and (biased) variance over all but the last axis; and x.
template <typename T>
class Moments : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const int64_t C = input.dim_size(input.dims() - 1), rows = input.NumElements() / std::max<int64_t>(C, 1);
    OP_REQUIRES(context, rows > 0, errors::InvalidArgument("There is nothing to take moments of."));
    const T* x = input.flat<T>().data();
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, TensorShape({2, C}), &output));
    context->set_output(1, input);
    std::vector<double> parts(kStripes * 2 * C, 0.0);
    ForStripes(context, rows, C, [&](int64_t stripe, int64_t first, int64_t last) {
      double* part = parts.data() + stripe * 2 * C;
      for (int64_t begin = first; begin < last; begin += kBlock)
        for (int64_t c = 0; c < C; c += kLanes) {
          // Sums of differences from the first row: those of the values themselves would cancel out.
          const Lanes pivot = LoadSome(x + c, C - c);
          Lanes sum = {}, square = {};
          for (int64_t n = begin; n < std::min(begin + kBlock, last); ++n) {
            __builtin_prefetch(x + (n + kBlock) * C + c);
            const Lanes value = LoadSome(x + n * C + c, C - c) - pivot;
            sum += value;
            square += value * value;
          }
          for (int64_t i = 0; i < std::min<int64_t>(kLanes, C - c); ++i) {
            part[c + i] += sum[i];
            part[C + c + i] += square[i];
          }
        }
    });
    const std::vector<double> sums = AddStripes(parts, 2 * C);
    float* y = output->flat<float>().data();
    for (int64_t c = 0; c < C; ++c) {
      const double mean = sums[c] / rows;
      y[c] = static_cast<float>(static_cast<float>(x[c]) + mean);
      y[C + c] = static_cast<float>(std::max(0.0, sums[C + c] / rows - mean * mean));
    }
  }
};

// The gradient of Moments: x (..., C), its moments (2, C), their gradient (2, C), and that of x as passed on -> (..., C).
template <typename T>
class MomentsGrad : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const int64_t C = input.dim_size(input.dims() - 1), rows = input.NumElements() / std::max<int64_t>(C, 1);
    const T* x = input.flat<T>().data();
    const float* moments = context->input(1).flat<float>().data();
    const float* gradient = context->input(2).flat<float>().data();
    const T* later = context->input(3).flat<T>().data();
    Tensor* output;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({3}, 0, input.shape(), &output));
    T* dx = output->flat<T>().data();
    std::vector<float> slope(C), offset(C);
    for (int64_t c = 0; c < C; ++c) {
      slope[c] = 2 * gradient[C + c] / rows;
      offset[c] = gradient[c] / rows - slope[c] * moments[c];
    }
    ForStripes(context, rows, C, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        for (int64_t c = 0; c < C; c += kLanes) {
          const int64_t at = n * C + c, left = C - c;
          const Lanes value = LoadSome(x + at, left) * LoadSome(&slope[c], left) + LoadSome(&offset[c], left);
          StoreSome(value + LoadSome(later + at, left), dx + at, left);
        }
    });
  }
};

// What NormRelu and its gradient need of the pieces: where each lies and where its channels begin.
template <typename T>
struct Pieces {
  std::vector<const T*> data;
  std::vector<int64_t> width, start;
  int64_t channels = 0, rows = 0;

  Status Read(const OpInputList& list) {
    for (const Tensor& piece : list) {
      const int64_t C = piece.dim_size(piece.dims() - 1), n = piece.NumElements() / std::max<int64_t>(C, 1);
      if (!data.empty() && n != rows) return errors::InvalidArgument("The pieces differ in rows.");
      data.push_back(piece.flat<T>().data());
      width.push_back(C);
      start.push_back(channels);
      channels += C;
      rows = n;
    }
    return OkStatus();
  }
};

// y = x * scale + shift is the normalisation; the same numbers forwards and backwards, so that the mask is the same.
void ScaleAndShift(const float* mean, const float* variance, const float* gamma, const float* beta, float epsilon,
                   int64_t C, std::vector<float>* scale, std::vector<float>* shift) {
  scale->resize(C);
  shift->resize(C);
  for (int64_t c = 0; c < C; ++c) {
    (*scale)[c] = gamma[c] / std::sqrt(variance[c] + epsilon);
    (*shift)[c] = beta[c] - mean[c] * (*scale)[c];
  }
}

// pieces (..., C_p), their moments (2, C_p) while training, moving moments, gamma, beta (C)
// -> relu of the normalised join (..., C), the moving moments as they are next, the moments (2, C) that were used, and
// the pieces (or nothing, where nobody else reads them).
template <typename T>
class NormRelu : public OpKernel {
 public:
  explicit NormRelu(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    OP_REQUIRES_OK(context, context->GetAttr("momentum", &momentum_));
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }
  void Compute(OpKernelContext* context) override {
    OpInputList list, moments;
    OP_REQUIRES_OK(context, context->input_list("pieces", &list));
    OP_REQUIRES_OK(context, context->input_list("moments", &moments));
    Pieces<T> pieces;
    OP_REQUIRES_OK(context, pieces.Read(list));
    const int64_t C = pieces.channels;
    const Tensor *moving_mean, *moving_variance, *gamma, *beta;
    OP_REQUIRES_OK(context, context->input("moving_mean", &moving_mean));
    OP_REQUIRES_OK(context, context->input("moving_variance", &moving_variance));
    OP_REQUIRES_OK(context, context->input("gamma", &gamma));
    OP_REQUIRES_OK(context, context->input("beta", &beta));
    for (const Tensor* vector : {moving_mean, moving_variance, gamma, beta})
      OP_REQUIRES(context, vector->NumElements() == C, errors::InvalidArgument("The pieces have ", C, " channels."));

    Tensor *output, *next_mean, *next_variance, *used;
    TensorShape shape = list[0].shape();
    shape.set_dim(shape.dims() - 1, C);
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({C}), &next_mean));
    OP_REQUIRES_OK(context, context->allocate_output(2, TensorShape({C}), &next_variance));
    OP_REQUIRES_OK(context, context->allocate_output(3, TensorShape({2, C}), &used));
    float *mean = used->flat<float>().data(), *variance = mean + C;
    float *next_m = next_mean->flat<float>().data(), *next_v = next_variance->flat<float>().data();
    const float *moving_m = moving_mean->flat<float>().data(), *moving_v = moving_variance->flat<float>().data();
    if (moments.size() == 0) {
      std::copy(moving_m, moving_m + C, mean);
      std::copy(moving_v, moving_v + C, variance);
      std::copy(moving_m, moving_m + C, next_m);
      std::copy(moving_v, moving_v + C, next_v);
    } else {
      for (size_t p = 0; p < pieces.data.size(); ++p) {
        const float* both = moments[p].flat<float>().data();
        std::copy(both, both + pieces.width[p], mean + pieces.start[p]);
        std::copy(both + pieces.width[p], both + 2 * pieces.width[p], variance + pieces.start[p]);
      }
      for (int64_t c = 0; c < C; ++c) {
        next_m[c] = moving_m[c] * momentum_ + mean[c] * (1 - momentum_);
        next_v[c] = moving_v[c] * momentum_ + variance[c] * (1 - momentum_);
      }
    }
    std::vector<float> scale, shift;
    ScaleAndShift(mean, variance, gamma->flat<float>().data(), beta->flat<float>().data(), epsilon_, C, &scale, &shift);
    OpOutputList passed;
    OP_REQUIRES_OK(context, context->output_list("passed", &passed));
    for (int p = 0; p < passed.size(); ++p) passed.set(p, list[p]);
    T* y = output->flat<T>().data();
    const Lanes floor = Lanes{} + (relu_ ? 0.0f : -INFINITY);
    ForStripes(context, pieces.rows, C, [&](int64_t, int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        for (size_t p = 0; p < pieces.data.size(); ++p) {
          const int64_t width = pieces.width[p];
          const T* in = pieces.data[p] + n * width;
          T* out = y + n * C + pieces.start[p];
          const float *a = scale.data() + pieces.start[p], *b = shift.data() + pieces.start[p];
          for (int64_t c = 0; c < width; c += kLanes) {
            const int64_t left = width - c;
            const Lanes value = LoadSome(in + c, left) * LoadSome(a + c, left) + LoadSome(b + c, left);
            // In this order a NaN stays one.
            StoreSome(value < floor ? floor : value, out + c, left);
          }
        }
    });
  }

 private:
  float epsilon_, momentum_;
  bool relu_;
};

// 32 channels (or the last few) of a block of rows of one piece backwards: dx = dy * scale where the result was above zero,
// plus the gradient of later readers; adds dy there to `sum`, and its product with x - mean to `product`.
template <typename T, bool whole>
inline void BlockGrad(const T* x, int64_t width, const T* dy, int64_t stride, const T* later, T* dx, int64_t rows,
                      int64_t left, bool relu, const float* scale_at, const float* shift_at, const float* mean_at,
                      double* sum_at, double* product_at) {
  constexpr int kVectors = whole ? kWide / kLanes : 1;
  Lanes scale[kVectors], shift[kVectors], mean[kVectors], sum[kVectors] = {}, product[kVectors] = {};
  const int64_t count = whole ? kLanes : left;
  for (int k = 0; k < kVectors; ++k) {
    scale[k] = LoadSome(scale_at + k * kLanes, count);
    shift[k] = LoadSome(shift_at + k * kLanes, count);
    mean[k] = LoadSome(mean_at + k * kLanes, count);
  }
  const Lanes zero = {};
  for (int64_t n = 0; n < rows; ++n, x += width, dy += stride, dx += width) {
    // The processor's own prefetching follows few streams; here are four for every piece.
    for (int at = 0; at < kVectors * kLanes; at += 64 / sizeof(T)) {
      __builtin_prefetch(dy + kBlock * stride + at);
      __builtin_prefetch(x + kBlock * width + at);
      __builtin_prefetch(dx + kBlock * width + at, 1);
      if (later) __builtin_prefetch(later + (n + kBlock) * width + at);
    }
    for (int k = 0; k < kVectors; ++k) {
      const int at = k * kLanes;
      const Lanes value = LoadSome(x + at, count), up = LoadSome(dy + at, count);
      const Lanes gradient = !relu || value * scale[k] + shift[k] > zero ? up : zero;
      sum[k] += gradient;
      product[k] += gradient * (value - mean[k]);
      Lanes down = gradient * scale[k];
      if (later) down += LoadSome(later + n * width + at, count);
      StoreSome(down, dx + at, count);
    }
  }
  for (int k = 0; k < kVectors; ++k)
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, count); ++i) {
      sum_at[k * kLanes + i] += sum[k][i];
      product_at[k * kLanes + i] += product[k][i];
    }
}

// dy (..., C), the pieces, the gradients of the pieces as passed on, the moments (2, C) that were used, gamma, beta
// -> gradients of the pieces (their moments held fixed), of their moments (2, C_p), of gamma and of beta (C).
template <typename T>
class NormReluGrad : public OpKernel {
 public:
  explicit NormReluGrad(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("epsilon", &epsilon_));
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }
  void Compute(OpKernelContext* context) override {
    OpInputList list;
    OP_REQUIRES_OK(context, context->input_list("pieces", &list));
    Pieces<T> pieces;
    OP_REQUIRES_OK(context, pieces.Read(list));
    const int64_t C = pieces.channels;
    const Tensor *gradient, *used, *gamma_in, *beta_in;
    OP_REQUIRES_OK(context, context->input("dy", &gradient));
    OP_REQUIRES_OK(context, context->input("used", &used));
    OP_REQUIRES_OK(context, context->input("gamma", &gamma_in));
    OP_REQUIRES_OK(context, context->input("beta", &beta_in));
    OP_REQUIRES(context, gradient->NumElements() == pieces.rows * C, errors::InvalidArgument("dy has another shape."));
    const T* dy = gradient->flat<T>().data();
    const float *mean = used->flat<float>().data(), *variance = mean + C;
    const float* gamma = gamma_in->flat<float>().data();

    OpInputList later;
    OP_REQUIRES_OK(context, context->input_list("later", &later));
    OpOutputList dmoments;
    OP_REQUIRES_OK(context, context->output_list("dmoments", &dmoments));
    std::vector<T*> dx;
    for (int p = 0; p < list.size(); ++p) {
      Tensor* output;
      const TensorShape& shape = list[p].shape();
      if (later.size()) {
        OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({1 + list.size() + p}, p, shape, &output));
      } else {
        OP_REQUIRES_OK(context, context->allocate_output(p, shape, &output));
      }
      dx.push_back(output->flat<T>().data());
    }
    const int next = list.size() + dmoments.size();
    Tensor *dgamma, *dbeta;
    OP_REQUIRES_OK(context, context->allocate_output(next, TensorShape({C}), &dgamma));
    OP_REQUIRES_OK(context, context->allocate_output(next + 1, TensorShape({C}), &dbeta));

    std::vector<float> scale, shift;
    ScaleAndShift(mean, variance, gamma, beta_in->flat<float>().data(), epsilon_, C, &scale, &shift);
    std::vector<double> parts(kStripes * 2 * C, 0.0);
    ForStripes(context, pieces.rows, 2 * C, [&](int64_t stripe, int64_t first, int64_t last) {
      double* part = parts.data() + stripe * 2 * C;
      for (int64_t begin = first; begin < last; begin += kBlock) {
        const int64_t rows = std::min(kBlock, last - begin);
        for (size_t p = 0; p < pieces.data.size(); ++p) {
          const int64_t width = pieces.width[p], from = begin * width;
          const T* others = later.size() ? later[p].flat<T>().data() + from : nullptr;
          for (int64_t c = 0; c < width;) {
            const int64_t at = pieces.start[p] + c;
            const bool whole = width - c >= kWide;
            const auto grad = whole ? BlockGrad<T, true> : BlockGrad<T, false>;
            grad(pieces.data[p] + from + c, width, dy + begin * C + at, C, others ? others + c : nullptr,
                 dx[p] + from + c, rows, width - c, relu_, &scale[at], &shift[at], mean + at, part + at, part + C + at);
            c += whole ? kWide : kLanes;
          }
        }
      }
    });
    const std::vector<double> sums = AddStripes(parts, 2 * C);
    float *dg = dgamma->flat<float>().data(), *db = dbeta->flat<float>().data();
    std::vector<float> dmean(C), dvariance(C);
    for (int64_t c = 0; c < C; ++c) {
      const double inverse = 1.0 / std::sqrt(static_cast<double>(variance[c]) + epsilon_);
      dg[c] = static_cast<float>(sums[C + c] * inverse);
      db[c] = static_cast<float>(sums[c]);
      dmean[c] = static_cast<float>(-sums[c] * gamma[c] * inverse);
      dvariance[c] = static_cast<float>(-0.5 * sums[C + c] * gamma[c] * inverse * inverse * inverse);
    }
    for (int p = 0; p < dmoments.size(); ++p) {
      const int64_t width = pieces.width[p], start = pieces.start[p];
      Tensor* output;
      OP_REQUIRES_OK(context, dmoments.allocate(p, TensorShape({2, width}), &output));
      float* both = output->flat<float>().data();
      std::copy_n(&dmean[start], width, both);
      std::copy_n(&dvariance[start], width, both + width);
    }
  }

 private:
  float epsilon_;
  bool relu_;
};

Status ShapeOfMoments(shape_inference::InferenceContext* c) {
  c->set_output(0, c->Matrix(2, c->Dim(c->input(0), -1)));
  c->set_output(1, c->input(0));
  return OkStatus();
}

Status ShapeOfNormRelu(shape_inference::InferenceContext* c) {
  std::vector<shape_inference::ShapeHandle> pieces, gamma, passed;
  TF_RETURN_IF_ERROR(c->input("pieces", &pieces));
  TF_RETURN_IF_ERROR(c->input("gamma", &gamma));
  shape_inference::ShapeHandle joined;
  TF_RETURN_IF_ERROR(c->ReplaceDim(pieces[0], -1, c->Dim(gamma[0], 0), &joined));
  c->set_output(0, joined);
  c->set_output(1, gamma[0]);
  c->set_output(2, gamma[0]);
  c->set_output(3, c->Matrix(2, c->Dim(gamma[0], 0)));
  for (int p = 0; p + 4 < c->num_outputs(); ++p) c->set_output(4 + p, pieces[p]);
  return OkStatus();
}

Status ShapeOfNormReluGrad(shape_inference::InferenceContext* c) {
  std::vector<shape_inference::ShapeHandle> pieces, gamma;
  TF_RETURN_IF_ERROR(c->input("pieces", &pieces));
  TF_RETURN_IF_ERROR(c->input("gamma", &gamma));
  const int count = pieces.size(), last = c->num_outputs() - 2;
  for (int i = 0; i < count; ++i) c->set_output(i, pieces[i]);
  for (int i = count; i < last; ++i) c->set_output(i, c->Matrix(2, c->Dim(pieces[i - count], -1)));
  c->set_output(last, gamma[0]);
  c->set_output(last + 1, gamma[0]);
  return OkStatus();
}

}  // namespace

REGISTER_OP("WorkbenchMoments")
    .Input("x: T")
    .Output("moments: float")
    .Output("passed: T")
    .Attr("T: {float, bfloat16}")
    .SetShapeFn(ShapeOfMoments);

REGISTER_OP("WorkbenchMomentsGrad")
    .Input("x: T")
    .Input("moments: float")
    .Input("gradient: float")
    .Input("later: T")
    .Output("dx: T")
    .Attr("T: {float, bfloat16}")
    .SetShapeFn(shape_inference::UnchangedShape);

REGISTER_OP("WorkbenchNormRelu")
    .Input("pieces: P * T")
    .Input("moments: M * float")
    .Input("moving_mean: float")
    .Input("moving_variance: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("y: T")
    .Output("next_mean: float")
    .Output("next_variance: float")
    .Output("used: float")
    .Output("passed: K * T")
    .Attr("P: int >= 1")
    .Attr("M: int >= 0")
    .Attr("K: int >= 0")
    .Attr("T: {float, bfloat16}")
    .Attr("epsilon: float")
    .Attr("momentum: float")
    .Attr("relu: bool")
    .SetShapeFn(ShapeOfNormRelu);

REGISTER_OP("WorkbenchNormReluGrad")
    .Input("dy: T")
    .Input("pieces: P * T")
    .Input("later: K * T")
    .Input("used: float")
    .Input("gamma: float")
    .Input("beta: float")
    .Output("dpieces: P * T")
    .Output("dmoments: M * float")
    .Output("dgamma: float")
    .Output("dbeta: float")
    .Attr("P: int >= 1")
    .Attr("M: int >= 0")
    .Attr("K: int >= 0")
    .Attr("T: {float, bfloat16}")
    .Attr("epsilon: float")
    .Attr("relu: bool")
    .SetShapeFn(ShapeOfNormReluGrad);

#define REGISTER(name, kernel)                                                                      \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_CPU).TypeConstraint<float>("T"), kernel<float>); \
  REGISTER_KERNEL_BUILDER(Name(name).Device(DEVICE_CPU).TypeConstraint<bfloat16>("T"), kernel<bfloat16>)
REGISTER("WorkbenchMoments", Moments);
REGISTER("WorkbenchMomentsGrad", MomentsGrad);
REGISTER("WorkbenchNormRelu", NormRelu);
REGISTER("WorkbenchNormReluGrad", NormReluGrad);
