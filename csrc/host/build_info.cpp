#include "build_info.h"

#include <torch/version.h>

#define PETL_TEXT(x) #x
#define PETL_TEXT_OF(x) PETL_TEXT(x)

namespace petl {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string vectors() {
#if defined(CPU_CAPABILITY_AVX512)
  return "AVX512";
#elif defined(CPU_CAPABILITY_AVX2)
  return "AVX2";
#else
  return "default";
#endif
}

std::string cuda() {
#if defined(PETL_CUDA)
  return PETL_TEXT_OF(PETL_CUDA);
#else
  return "no";
#endif
}

} // namespace

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", compiler()},
      {"flags", PETL_FLAGS},
      {"torch", TORCH_VERSION},
      {"vectors", vectors()},
      {"cuda", cuda()}};
}

} // namespace petl
