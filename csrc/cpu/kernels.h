// The CPU kernels, one file an op. Shapes and formulas: petl_kernels/ops/<op>.py.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace petl {

at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

std::tuple<at::Tensor, at::Tensor> frozen_linear_backward(
    const at::Tensor& dy, const at::Tensor& weight, bool need_dx, bool need_dbias);

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_linear(
    const at::Tensor& x,
    at::TensorList weights,
    const c10::List<std::optional<at::Tensor>>& biases,
    at::TensorList a,
    at::TensorList b,
    at::ArrayRef<double> scales,
    double dropout,
    const std::optional<at::Tensor>& seed);

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
lora_linear_backward(
    at::TensorList dys,
    const at::Tensor& x,
    const at::Tensor& s,
    at::TensorList weights,
    at::TensorList a,
    at::TensorList b,
    at::ArrayRef<double> scales,
    double dropout,
    const std::optional<at::Tensor>& seed,
    bool need_dx,
    const c10::List<bool>& need_dbias);

at::Tensor bottleneck_adapter(
    const at::Tensor& x,
    const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& ln_weight,
    const std::optional<at::Tensor>& ln_bias,
    const at::Tensor& down,
    const std::optional<at::Tensor>& down_bias,
    const at::Tensor& up,
    const std::optional<at::Tensor>& up_bias,
    double eps,
    std::string_view activation,
    double scale);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
bottleneck_adapter_backward(
    const at::Tensor& dy,
    const at::Tensor& x,
    bool residual_is_x,
    const std::optional<at::Tensor>& ln_weight,
    const std::optional<at::Tensor>& ln_bias,
    const at::Tensor& down,
    const std::optional<at::Tensor>& down_bias,
    const at::Tensor& up,
    double eps,
    std::string_view activation,
    double scale,
    bool need_dx,
    bool has_up_bias);

std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& prefix_k,
    const std::optional<at::Tensor>& prefix_v,
    bool causal,
    double scale,
    double dropout,
    const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k,
    const std::optional<at::Tensor>& distance_bias);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
attention_backward(
    const at::Tensor& dout,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& o,
    const at::Tensor& lse,
    const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& prefix_k,
    const std::optional<at::Tensor>& prefix_v,
    bool causal,
    double scale,
    double dropout,
    const std::optional<at::Tensor>& seed,
    bool need_dbias,
    const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k,
    const std::optional<at::Tensor>& distance_bias,
    bool need_ddistance_bias);

// One chunk of logits (rows, V), which the gradient overwrites; labels and dlosses (rows,), bias (V,).
at::Tensor linear_cross_entropy(
    const at::Tensor& logits,
    const at::Tensor& labels,
    const std::optional<at::Tensor>& bias,
    double label_weight,
    double word_weight,
    double scale,
    const std::optional<at::Tensor>& dlosses,
    bool gradient);

// The same by words (petl_kernels/ops/loss_by_words.py): rows (rows, d), weight (V, d), labels (rows,), word_sum (d,);
// state (4, rows) and total (rows, d) in the dtype of sums.
at::Tensor linear_cross_entropy_begin(
    const at::Tensor& rows,
    const at::Tensor& weight,
    const at::Tensor& labels,
    const std::optional<at::Tensor>& word_sum);

// One block of logits (rows, words), which E overwrites.
void linear_cross_entropy_words(
    const at::Tensor& logits,
    const at::Tensor& labels,
    int64_t first,
    const at::Tensor& state,
    const std::optional<at::Tensor>& total,
    bool fresh);

// The losses (rows,), and their gradient into out (rows, d).
at::Tensor linear_cross_entropy_end(
    const at::Tensor& weight,
    const at::Tensor& labels,
    const at::Tensor& state,
    const std::optional<at::Tensor>& total,
    const std::optional<at::Tensor>& word_sum,
    double label_weight,
    double word_weight,
    const std::optional<at::Tensor>& dlosses,
    const std::optional<at::Tensor>& out);

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double eps);

at::Tensor layer_norm_from_statistics(
    const at::Tensor& x,
    const at::Tensor& mean,
    const at::Tensor& rstd,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias);

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const at::Tensor& dy,
    const at::Tensor& x,
    const at::Tensor& mean,
    const at::Tensor& rstd,
    const at::Tensor& weight,
    bool need_dx,
    bool need_dweight,
    bool need_dbias);

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

at::Tensor rms_norm_from_statistics(const at::Tensor& x, const at::Tensor& rstd, const at::Tensor& weight);

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& dy,
    const at::Tensor& x,
    const at::Tensor& rstd,
    const at::Tensor& weight,
    bool need_dx,
    bool need_dweight);

std::tuple<at::Tensor, at::Tensor, at::Tensor> frozen_ffn(
    const at::Tensor& x,
    at::TensorList w1,
    const std::optional<at::Tensor>& c1,
    at::TensorList w2,
    const std::optional<at::Tensor>& c2,
    at::TensorList gate,
    std::string_view activation,
    std::string_view keeps);

std::tuple<at::Tensor, at::Tensor, at::Tensor> frozen_ffn_backward(
    const at::Tensor& dy,
    const std::optional<at::Tensor>& x,
    const at::Tensor& kept_z,
    const at::Tensor& kept_g,
    at::TensorList w1,
    const std::optional<at::Tensor>& c1,
    at::TensorList w2,
    at::TensorList gate,
    std::string_view activation,
    std::string_view keeps,
    bool need_dx,
    bool need_dc1,
    bool need_dc2);
at::Tensor dropout_add(const at::Tensor& x, const at::Tensor& residual, double p, const at::Tensor& seed);

at::Tensor dropout_add_backward(const at::Tensor& dy, at::ScalarType dtype, double p, const at::Tensor& seed);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dropout_add_norm(
    const at::Tensor& y,
    const at::Tensor& residual,
    const at::Tensor& weight,
    const std::optional<at::Tensor>& bias,
    double eps,
    double p,
    const std::optional<at::Tensor>& seed,
    bool centred);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dropout_add_norm_backward(
    const at::Tensor& du,
    const std::optional<at::Tensor>& dresidual,
    const at::Tensor& h,
    const std::optional<at::Tensor>& mean,
    const at::Tensor& rstd,
    const at::Tensor& weight,
    std::optional<at::ScalarType> dtype,
    double p,
    const std::optional<at::Tensor>& seed,
    bool need_dweight,
    bool need_dbias);

std::tuple<at::Tensor, at::Tensor> activation(
    const at::Tensor& z, std::string_view kind, double dropout, const std::optional<at::Tensor>& seed);

at::Tensor activation_backward(
    const at::Tensor& dy,
    const at::Tensor& saved,
    std::string_view kind,
    double dropout,
    const std::optional<at::Tensor>& seed);

at::Tensor gated_activation(
    const at::Tensor& z,
    const at::Tensor& g,
    std::string_view kind,
    double dropout,
    const std::optional<at::Tensor>& seed);

std::tuple<at::Tensor, at::Tensor> gated_activation_backward(
    const at::Tensor& dy,
    const at::Tensor& z,
    const at::Tensor& g,
    std::string_view kind,
    double dropout,
    const std::optional<at::Tensor>& seed);

// A weight is a list of parts: one dense tensor, or those of a quantized weight.
std::vector<at::Tensor> quantize_int8(const at::Tensor& weight);
std::vector<at::Tensor> quantize_nf4(const at::Tensor& weight);
at::Tensor dequantize(
    at::TensorList parts, int64_t first_row, int64_t rows, int64_t columns, at::ScalarType dtype);

at::Tensor quantized_project(const at::Tensor& rows, at::TensorList parts, const std::optional<at::Tensor>& bias);
at::Tensor quantized_project_back(const at::Tensor& rows, at::TensorList parts);
at::Tensor quantized_embedding(const at::Tensor& ids, at::TensorList parts, int64_t columns, at::ScalarType dtype);

} // namespace petl
