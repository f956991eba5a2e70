#include "cpu_isa/isa.h"

#include <atomic>
#include <cstdlib>

namespace flute::cpu {

#if defined(__x86_64__)
extern const Isa kAvx512Bf16, kAvx512, kAvx2;
#elif defined(__aarch64__)
extern const Isa kNeon;
#endif
extern const Isa kScalar;

namespace {

struct Candidate {
  const Isa* isa;
  bool present;  // on this processor
};

// Best first.
const std::vector<Candidate>& candidates() {
#if defined(__x86_64__)
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
  static const bool avx2 = HAS("avx2") && HAS("fma") && HAS("f16c");
  static const bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
  static const bool avx512bf16 = avx512 && HAS("avx512vbmi") && HAS("avx512bf16");
#undef HAS
  static const std::vector<Candidate> all = {
      {&kAvx512Bf16, avx512bf16}, {&kAvx512, avx512}, {&kAvx2, avx2}, {&kScalar, true}};
#elif defined(__aarch64__)
  static const std::vector<Candidate> all = {{&kNeon, true}, {&kScalar, true}};
#else
  static const std::vector<Candidate> all = {{&kScalar, true}};
#endif
  return all;
}

const Isa* find(const std::string& name) {
  for (const Candidate& candidate : candidates()) {
    if (candidate.present && name == candidate.isa->name) return candidate.isa;
  }
  return nullptr;
}

const Isa* choose() {
  // An unknown name is reported by the Python package when it is imported; here the best set serves.
  if (const char* wanted = std::getenv("FLUTE_CPU_ISA")) {
    if (const Isa* found = find(wanted)) return found;
  }
  for (const Candidate& candidate : candidates()) {
    if (candidate.present) return candidate.isa;
  }
  return &kScalar;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> chosen{choose()};
  return chosen;
}

}  // namespace

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.present) names.emplace_back(candidate.isa->name);
  }
  return names;
}

bool select_isa(const std::string& name) {
  const Isa* found = find(name);
  if (found) current().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace flute::cpu
