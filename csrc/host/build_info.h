#pragma once

#include <map>
#include <string>

namespace petl {

// compiler, flags, torch, vectors (the CPU capability compiled for), cuda ("no" or the toolkit's version).
std::map<std::string, std::string> build_info();

} // namespace petl
