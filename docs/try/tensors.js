// Arrays (1, channels, height, width) that go through networks, and images.

/** @typedef {{channels: number, height: number, width: number, data: Float32Array}} Planes */
/** @typedef {{width: number, height: number, data: Uint8ClampedArray}} Pixels RGBA, as a canvas has them */

/** The value in [-1, 1] of each level, in float32 throughout. */
const LEVELS = Float32Array.from({ length: 256 }, (_, level) => Math.fround(level / 127.5) - 1);

const upTo = (side, multiple) => Math.ceil(side / multiple) * multiple;

/** An image with its last row and column repeated to multiples. @param {Pixels} pixels @returns {Planes} */
export function fromPixels(pixels, multiple) {
  const plane = pixels.width * pixels.height;
  const data = new Float32Array(3 * plane);
  for (let place = 0; place < plane; place++) {
    for (let channel = 0; channel < 3; channel++)
      data[channel * plane + place] = LEVELS[pixels.data[4 * place + channel]];
  }
  return pad({ channels: 3, height: pixels.height, width: pixels.width, data }, multiple);
}

/** The upper left part of an image, clamped and rounded. @param {Planes} planes @returns {Pixels} */
export function toPixels(planes, height, width) {
  const data = new Uint8ClampedArray(4 * width * height).fill(255); // which rounds and clamps what is put in
  for (let channel = 0; channel < 3; channel++) {
    for (let row = 0; row < height; row++) {
      const from = (channel * planes.height + row) * planes.width;
      for (let column = 0; column < width; column++) {
        data[4 * (row * width + column) + channel] = (planes.data[from + column] + 1) * 127.5;
      }
    }
  }
  return { width, height, data };
}

/** Repeat the last row and column until both sides are multiples. @returns {Planes} */
export const pad = (planes, multiple) => resize(planes, upTo(planes.height, multiple), upTo(planes.width, multiple));

/** The upper left part, or with the last row and column repeated to a larger size. @returns {Planes} */
export function resize(planes, height, width) {
  if (height === planes.height && width === planes.width) return planes;
  const data = new Float32Array(planes.channels * height * width);
  let next = 0;
  for (let channel = 0; channel < planes.channels; channel++) {
    for (let row = 0; row < height; row++) {
      const from = (channel * planes.height + Math.min(row, planes.height - 1)) * planes.width;
      for (let column = 0; column < width; column++)
        data[next++] = planes.data[from + Math.min(column, planes.width - 1)];
    }
  }
  return { channels: planes.channels, height, width, data };
}

/** Each channel times its own factor. @returns {Planes} */
export function scale(planes, factors) {
  const plane = planes.height * planes.width;
  return { ...planes, data: planes.data.map((value, place) => value * factors[Math.floor(place / plane)]) };
}

/** Root mean square of each channel. @returns {number[]} */
export function channelRms({ channels, height, width, data }) {
  const plane = height * width;
  return Array.from({ length: channels }, (_, channel) => {
    const own = data.subarray(channel * plane, (channel + 1) * plane);
    return Math.sqrt(own.reduce((sum, value) => sum + value * value, 0) / plane);
  });
}
