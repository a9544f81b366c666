// The formulas are in petl_kernels/ops/frozen_ffn.py. The products are the library's, on chunks of rows; everything
// between two products is one pass over the chunk, in pieces that stay in the first cache. c1 is added in its product,
// before the sum is rounded: behind it, ReLU would keep another sign than the sum has.
#include "activations.h"
#include "bits.h"
#include "column_sum.h"
#include "kernel.h"
#include "rows.h"
#include "shared.h"
#include "weight.h"

namespace petl {
namespace {

constexpr int64_t kPiece = 1024;  // columns; whole bytes of bits

// f(first_row, row_count) for chunks of equal length.
template <typename F>
void for_each_chunk(const Tensor& rows, int64_t hidden, const F& f) {
  const int64_t most = std::max(kChunkRows, kChunkBytes / std::max<int64_t>(1, hidden * rows.element_size()));
  Blocks(rows.size(0), most).for_each(0, std::max<int64_t>(1, at::divup(rows.size(0), most)), f);
}

// The hidden values of one chunk, as large as the first chunk (the largest).
Tensor chunk_like(const Tensor& rows, int64_t hidden) {
  int64_t most = 0;
  for_each_chunk(rows, hidden, [&](int64_t, int64_t count) { most = std::max(most, count); });
  return empty({most, hidden}, rows.scalar_type());
}

// f(first_column, column_count) for every piece of a row.
template <typename F>
void for_each_piece(int64_t columns, const F& f) {
  for (int64_t first = 0; first < columns; first += kPiece) {
    f(first, std::min(kPiece, columns - first));
  }
}

// The cut of a chunk for sums over its rows: so few rows a block that every thread has some.
Slices slices_of(const Tensor& chunk) {
  return Slices(Blocks(chunk.size(0), 32));
}

template <typename acc_t>
void multiply(const acc_t* __restrict factors, acc_t* __restrict values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    values[j] *= factors[j];
  }
}

template <typename T>
T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

struct Hidden {
  Activation activation;

  // h = act(z) [⊙ g]. bits: which h are positive, or undefined. h may be z.
  void forward(const Tensor& z, const Tensor& g, const Tensor& bits, const Tensor& h) const {
    PETL_DISPATCH_FLOATING(z.scalar_type(), "frozen_ffn", [&] {
      using acc_t = compute_t<scalar_t>;
      const int64_t f = z.size(1), width = packed_width(f);
      const auto* z_data = z.const_data_ptr<scalar_t>();
      auto* h_data = h.mutable_data_ptr<scalar_t>();
      const auto* g_data = data_or_null<scalar_t>(g);
      auto* bits_data = data_or_null<uint8_t>(bits);
      const Scratch<acc_t> value_buffer(kPiece), gate_buffer(kPiece);
      const auto piece = [&](int64_t row, int64_t first, int64_t count) {
        acc_t *values = value_buffer.mine(), *gates = gate_buffer.mine();
        const int64_t at = row * f + first;
        convert(z_data + at, values, count);
        activate(activation, values, count);
        if (bits_data != nullptr) {
          pack_nonzero(values, count, bits_data + row * width + first / 8);
        }
        if (g_data != nullptr) {
          multiply(converted(g_data + at, gates, count), values, count);
        }
        convert(values, h_data + at, count);
      };
      at::parallel_for(0, z.size(0), 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          for_each_piece(f, [&](int64_t first, int64_t count) { piece(row, first, count); });
        }
      });
    });
  }

  // dh becomes dz; dg = dh ⊙ act(z) where there is a gate; dc1 += Σ dz where that is wanted.
  void backward(const Tensor& z, const Tensor& g, const Tensor& dh, const Tensor& dg, const OptionalTensor& dc1) const {
    const Slices slices = slices_of(dh);
    const Tensor sums = dc1 ? slices.partial_sums(dh, {dh.size(1)}) : Tensor();
    PETL_DISPATCH_FLOATING(z.scalar_type(), "frozen_ffn_backward", [&] {
      using acc_t = compute_t<scalar_t>;
      const int64_t f = z.size(1);
      const auto* z_data = z.const_data_ptr<scalar_t>();
      auto* dh_data = dh.mutable_data_ptr<scalar_t>();
      const auto* g_data = data_or_null<scalar_t>(g);
      auto* dg_data = data_or_null<scalar_t>(dg);
      const Scratch<acc_t> value_buffer(kPiece), grad_buffer(kPiece), gate_buffer(kPiece);
      const auto piece = [&](int64_t row, int64_t first, int64_t count, acc_t* sum) {
        acc_t *values = value_buffer.mine(), *grads = grad_buffer.mine(), *buffer = gate_buffer.mine();
        const int64_t at = row * f + first;
        convert(z_data + at, values, count);
        convert(dh_data + at, grads, count);
        if (g_data != nullptr) {
          std::copy_n(values, count, buffer);
          activate(activation, buffer, count);
          multiply(grads, buffer, count);
          convert(buffer, dg_data + at, count);
          multiply(converted(g_data + at, buffer, count), grads, count);
        }
        activate_backward(activation, values, grads, count);
        if (sum != nullptr) {
          accumulate(grads, sum + first, count);
        }
        convert(grads, dh_data + at, count);
      };
      slices.parallel_for_each([&](int64_t slice, int64_t first_row, int64_t row_count) {
        acc_t* sum = sums.defined() ? slice_of<acc_t>(sums, slice) : nullptr;
        for (int64_t row = first_row; row < first_row + row_count; ++row) {
          for_each_piece(f, [&](int64_t first, int64_t count) { piece(row, first, count, sum); });
        }
      });
    });
    if (dc1) {
      dc1->add_(Slices::total(sums));
    }
  }

  // dh becomes dz; dc1 += Σ dz
  static void backward_from_bits(const Tensor& bits, const Tensor& dh, const OptionalTensor& dc1) {
    PETL_DISPATCH_FLOATING(dh.scalar_type(), "frozen_ffn_backward", [&] {
      const int64_t f = dh.size(1), width = bits.size(1);
      const auto* bits_data = bits.const_data_ptr<uint8_t>();
      auto* dh_data = dh.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, dh.size(0), 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          keep_where(bits_data + row * width, dh_data + row * f, f);
        }
      });
    });
    if (dc1) {
      dc1->add_(column_sum(dh));
    }
  }
};

// The frozen weights, W1 and the gate (f, d), W2 (d, f).
struct Network {
  Network(at::TensorList w1, at::TensorList w2, at::TensorList gate, int64_t d)
      : w1(weight_with_in(w1, d)),
        w2(weight_with_out(w2, d)),
        gate(gate.empty() ? std::nullopt : std::optional(weight_with_in(gate, d))) {}

  Weight w1, w2;
  std::optional<Weight> gate;
};

// The rows of one chunk; undefined stays undefined.
Tensor part(const Tensor& rows, int64_t first, int64_t count) {
  return rows.defined() && count < rows.size(0) ? rows.narrow(0, first, count) : rows;
}

} // namespace

std::tuple<Tensor, Tensor, Tensor> frozen_ffn(
    const Tensor& x,
    at::TensorList w1_parts,
    const OptionalTensor& c1,
    at::TensorList w2_parts,
    const OptionalTensor& c2,
    at::TensorList gate_parts,
    std::string_view activation,
    std::string_view keeps) {
  const Tensor rows = as_rows(x);
  const Network network(w1_parts, w2_parts, gate_parts, rows.size(1));
  const auto& [w1, w2, gate] = network;
  const int64_t tokens = rows.size(0), f = w1.out;
  const Hidden hidden{parse_activation(activation)};
  const bool keep_z = keeps == "z", keep_bits = keeps == "bits";
  Tensor y = empty(rows.sizes(), rows.scalar_type()), bits, kept_z, kept_g;
  if (keep_bits) {
    bits = empty({tokens, packed_width(f)}, at::kByte);
  }
  if (keep_z) {
    kept_z = empty({tokens, f}, x.scalar_type());
    kept_g = gate ? empty({tokens, f}, x.scalar_type()) : Tensor();
  }
  const Tensor h_chunk = chunk_like(rows, f), g_chunk = gate && !keep_z ? at::empty_like(h_chunk) : Tensor();

  for_each_chunk(rows, f, [&](int64_t first, int64_t count) {
    const Tensor x_rows = part(rows, first, count), h = part(h_chunk, 0, count);
    const Tensor z = keep_z ? part(kept_z, first, count) : h;
    const Tensor g = keep_z ? part(kept_g, first, count) : part(g_chunk, 0, count);
    project_out(z, x_rows, w1, c1);
    if (gate) {
      project_out(g, x_rows, *gate);
    }
    hidden.forward(z, g, part(bits, first, count), h);
    project_out(part(y, first, count), h, w2, c2);
  });
  return {
      with_sizes(y, x.sizes()),
      keep_bits ? bits : keep_z ? kept_z : absent(x.scalar_type()),
      kept_g.defined() ? kept_g : absent(x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> frozen_ffn_backward(
    const Tensor& dy,
    const OptionalTensor& x,
    const Tensor& kept_z,
    const Tensor& kept_g,
    at::TensorList w1_parts,
    const OptionalTensor& c1,
    at::TensorList w2_parts,
    at::TensorList gate_parts,
    std::string_view activation,
    std::string_view keeps,
    bool need_dx,
    bool need_dc1,
    bool need_dc2) {
  const Tensor rows = as_rows(dy), x_rows = x ? as_rows(*x) : Tensor();
  const Network network(w1_parts, w2_parts, gate_parts, rows.size(1));
  const auto& [w1, w2, gate] = network;
  const int64_t f = w1.out;
  const Hidden hidden{parse_activation(activation)};
  const bool recompute = keeps == "x";
  const auto sums = compute_type(dy);
  Tensor dx = need_dx ? empty(rows.sizes(), dy.scalar_type()) : absent(dy.scalar_type());
  const OptionalTensor dc1 = need_dc1 ? OptionalTensor(zeros({f}, sums)) : std::nullopt;

  if (need_dx || need_dc1) {
    const Tensor dh_chunk = chunk_like(rows, f), dg_chunk = gate ? at::empty_like(dh_chunk) : Tensor();
    const Tensor z_chunk = recompute ? at::empty_like(dh_chunk) : Tensor();
    const Tensor g_chunk = recompute && gate ? at::empty_like(dh_chunk) : Tensor();
    for_each_chunk(rows, f, [&](int64_t first, int64_t count) {
      const Tensor dz = part(dh_chunk, 0, count), dg = part(dg_chunk, 0, count);
      project_back_out(dz, part(rows, first, count), w2);
      if (keeps == "bits") {
        Hidden::backward_from_bits(part(kept_z, first, count), dz, dc1);
      } else {
        const Tensor z = recompute ? part(z_chunk, 0, count) : part(kept_z, first, count);
        const Tensor g = !gate ? Tensor() : recompute ? part(g_chunk, 0, count) : part(kept_g, first, count);
        if (recompute) {
          project_out(z, part(x_rows, first, count), w1, c1);
        }
        if (recompute && gate) {
          project_out(g, part(x_rows, first, count), *gate);
        }
        hidden.backward(z, g, dz, dg, dc1);
      }
      if (need_dx) {
        Tensor dx_rows = part(dx, first, count);
        project_back_out(dx_rows, dz, w1);
        if (gate) {
          project_back_out(dx_rows, dg, *gate, /*add=*/true);
        }
      }
    });
  }
  return {
      need_dx ? with_sizes(dx, dy.sizes()) : dx,
      dc1 ? *dc1 : absent(sums),
      need_dc2 ? column_sum(rows) : absent(sums)};
}

} // namespace petl

TORCH_LIBRARY_FRAGMENT(petl_cpu, m) {
  PETL_KERNEL(frozen_ffn);
  PETL_KERNEL(frozen_ffn_backward);
}
