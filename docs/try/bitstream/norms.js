// Side information of codings of indices: one byte for the root mean square of each latent channel
// (`oscar/bitstream/norms.py`).

const SMALLEST_RMS = 2 ** -4;

/** By code: zero, then 255 values from 2**-4 to 2**2 in equal ratios, in float32. No value is so near the middle
 * between two float32 numbers that an engine's own power function could decide. */
export const RMS = Float32Array.of(0, ...Array.from({ length: 255 }, (_, step) => 2 ** (-4 + (6 * step) / 254)));

/** Code of a root mean square: the nearest in ratio; under half of the smallest it is zero. */
export function quantiseRms(rms) {
  let code = 0;
  while (code < 255 && rms >= (code ? Math.sqrt(RMS[code] * RMS[code + 1]) : SMALLEST_RMS / 2)) code++;
  return code;
}
