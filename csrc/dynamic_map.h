// The maps of state in 8 bits, as ssah_kernels/dynamic_map.py specifies them.
//
// Decade i from 0 to 6 ends at 10^(i-6) and has n = 2^i values (2^(i+1) without signs):
//
//   10^(i-6) (0.1 + 0.9 (k + 0.5) / n)          for k from 0 to n - 1; and 0, and 1
//
// Source: Dettmers et al., arXiv 2110.02861, section 2.2. The first values with signs are 0, 5.5e-7
// and 3.25e-6. A bound is halfway between two values: the first is 2.75e-7, or 0x34939a86. Its
// upper 16 bits are those of the interval of numbers from 0x34930000 on, and no other bound has
// them. So they say which magnitude is the nearest, and whether the lower 16 bits have to be
// compared.
//
// Made while it is compiled. No header is included, since kernels of every instruction set use it.
#pragma once

namespace ssah {

constexpr long kStateBlock = 256;  // elements of a row with one scale

// The upper 16 bits of a float32 are its interval: of 2^-22 and all below the first, of 1 the last.
constexpr unsigned kFirstStart = (127 - 22) << 7, kStarts = (22 << 7) + 1;

struct DynamicMap {
  float values[256];         // of every code
  unsigned starts[kStarts];  // upper half: the magnitude nearest to the smallest number of the
                             // interval; lower half: that of the bound in it, or 0xffff
  unsigned most_negative;    // the largest magnitude below zero; 0 without signs
};

// The bits of a float32 that is 0 or normal, and not negative.
constexpr unsigned bits_of(double x) {
  if (x == 0) return 0;
  unsigned exponent = 127;
  for (; x >= 2; x /= 2) ++exponent;
  for (; x < 1; x *= 2) --exponent;
  return exponent << 23 | static_cast<unsigned>((x - 1) * 8388608);
}

constexpr DynamicMap make_dynamic_map(bool with_signs) {
  DynamicMap map{};
  const double ends[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  unsigned magnitudes = 1;  // that have a value; that of 0 is 0
  for (int i = 0; i < 7; ++i) {
    const int n = with_signs ? 1 << i : 2 << i;
    for (int k = 0; k < n; ++k) {
      map.values[magnitudes++] = static_cast<float>(ends[i] * (0.1 + 0.9 * (k + 0.5) / n));
    }
  }
  map.values[magnitudes++] = 1.0f;  // 129 of them, or 256 without signs

  unsigned bounds[256] = {};
  for (unsigned i = 0; i + 1 < magnitudes; ++i) {
    const double middle = (double(map.values[i]) + double(map.values[i + 1])) / 2;
    bounds[i] = bits_of(static_cast<float>(middle));
  }
  bounds[magnitudes - 1] = 0xffffffffu;  // nothing is beyond the last one

  // Without signs 0 is the bound of 0: what is greater than it is at least the next value, since
  // the update divides by its root. Of 0 itself the code is 0, whatever its interval says.
  unsigned magnitude = with_signs ? 0 : 1;
  for (unsigned i = 0; i < kStarts; ++i) {
    // Bits of positive numbers are in order, as the numbers are.
    const unsigned interval = kFirstStart + i;
    while (bounds[magnitude] < interval << 16) ++magnitude;
    const bool inside = bounds[magnitude] >> 16 == interval;
    map.starts[i] = magnitude << 16 | (inside ? bounds[magnitude] & 0xffffu : 0xffffu);
  }
  if (with_signs) {
    map.most_negative = magnitudes - 2;  // no code is -1
    for (unsigned i = 1; i <= map.most_negative; ++i) map.values[256 - i] = -map.values[i];
  }
  return map;
}

}  // namespace ssah
