// Rate points: stable ids, grid, codebook size and nominal bits per pixel (`oscar/rates.py`).

const PIXELS_PER_LATENT = 8;

/**
 * @typedef {object} RatePoint
 * @property {number} id stored in files
 * @property {number} bpp nominal bits per pixel
 * @property {number} downsample latent positions per index along each side
 * @property {number} codebookSize number of codes K
 */

/** By id: nominal bits per pixel, side of the grid for a 512x512 image, codebook size. @type {RatePoint[]} */
export const RATES = [
  [0.0019, 8, 256],
  [0.0098, 16, 1024],
  [0.0313, 32, 256],
  [0.043, 32, 2048],
  [0.0625, 64, 16],
  [0.0781, 64, 32],
  [0.0937, 64, 64],
  [0.125, 64, 256],
  [0.0024, 8, 1024],
  [0.0234, 32, 64],
  [0.0507, 32, 8192],
  [0.1093, 64, 128],
].map(([bpp, grid, codebookSize], id) => ({ id, bpp, downsample: 64 / grid, codebookSize }));

/** Rows and columns of the index grid of an image. @returns {[number, number]} */
export function gridShape(rate, height, width) {
  const pixels = PIXELS_PER_LATENT * rate.downsample;
  return [Math.ceil(height / pixels), Math.ceil(width / pixels)];
}

/** Whole bits that an index of a codebook of this size needs at fixed length. */
export const bitsPerPackedIndex = (codebookSize) => 32 - Math.clz32(codebookSize - 1);

/** Bytes of `count` indices at fixed length: the most that any payload takes. */
export const packedLength = (count, codebookSize) => Math.ceil((count * bitsPerPackedIndex(codebookSize)) / 8);
