// Layers of the hyperprior's integer networks. Activations are in units of 2**-6, weights of 2**-10, sums of 2**-16.

export const LOWEST = -32768; // of activations
const HIGHEST = 32767;

/** A grid of vectors with a margin of zeros. */
export class Field {
  constructor(rows, columns, channels, reach) {
    this.rows = rows;
    this.columns = columns;
    this.channels = channels;
    this.reach = reach;
    this.width = columns + 2 * reach;
    this.values = new Float64Array((rows + 2 * reach) * this.width * channels);
  }

  /** Where a position's vector begins. */
  place(row, column) {
    return ((row + this.reach) * this.width + column + this.reach) * this.channels;
  }

  /** Add to sums the products of a convolution's weights with the first `seen` channels around a place. */
  addProducts(sums, place, seen, { inputs, values }) {
    let tap = 0;
    for (let down = -this.reach; down <= this.reach; down++) {
      for (let right = -this.reach; right <= this.reach; right++) {
        const start = place + (down * this.width + right) * this.channels;
        addProducts(sums, this.values, start, seen, values, tap++ * inputs * sums.length);
      }
    }
  }

  /** The grid as (channels, rows, columns). */
  byChannel() {
    const result = new Int32Array(this.channels * this.rows * this.columns);
    let next = 0;
    for (let channel = 0; channel < this.channels; channel++) {
      for (let row = 0; row < this.rows; row++) {
        for (let column = 0; column < this.columns; column++)
          result[next++] = this.values[this.place(row, column) + channel];
      }
    }
    return result;
  }
}

/** sums += vector @ weights, for `count` numbers of `vector` and weights in rows of the sums' length. */
export function addProducts(sums, vector, start, count, weights, offset) {
  const size = sums.length;
  let input = 0;
  for (; input + 4 <= count; input += 4) {
    // four at once: fewer loads and stores of sums
    const [at, row] = [start + input, offset + input * size];
    const a = vector[at];
    const b = vector[at + 1];
    const c = vector[at + 2];
    const d = vector[at + 3];
    if (a === 0 && b === 0 && c === 0 && d === 0) continue;
    for (let output = 0; output < size; output++) {
      const weight = row + output;
      sums[output] +=
        a * weights[weight] +
        b * weights[weight + size] +
        c * weights[weight + 2 * size] +
        d * weights[weight + 3 * size];
    }
  }
  for (; input < count; input++) {
    const [value, row] = [vector[start + input], offset + input * size];
    for (let output = 0; output < size; output++) sums[output] += value * weights[row + output];
  }
}

/** Within the range of activations, which is that of int16. */
export const clip = (value, lowest) => Math.max(lowest, Math.min(HIGHEST, value));

/** Round sums to activations and cut them off, in place. */
export function activate(sums, lowest) {
  for (let place = 0; place < sums.length; place++) sums[place] = clip(Math.floor((sums[place] + 512) / 1024), lowest);
  return sums;
}

/** Convolve by 3x3, cut below zero, shuffle pixels: twice the rows and columns, a quarter of the outputs. */
export function upsample(grid, weights, bias) {
  const { rows, columns, channels } = grid;
  const field = new Field(rows, columns, channels, 1);
  for (let row = 0; row < rows; row++) {
    const start = row * columns * channels;
    field.values.set(grid.values.subarray(start, start + columns * channels), field.place(row, 0));
  }
  const size = bias.length / 4;
  const values = new Float64Array(rows * columns * bias.length);
  const sums = new Float64Array(bias.length);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      sums.set(bias);
      field.addProducts(sums, field.place(row, column), channels, weights);
      activate(sums, 0).forEach((value, output) => {
        const [channel, down, right] = [output >> 2, (output >> 1) & 1, output & 1];
        values[((2 * row + down) * 2 * columns + 2 * column + right) * size + channel] = value;
      });
    }
  }
  return { rows: 2 * rows, columns: 2 * columns, channels: size, values };
}

/** Weights of a convolution, (outputs, inputs, k, k), as (k * k, inputs, outputs). */
export function matrix({ shape: [outputs, inputs, kernel], data }) {
  const taps = kernel * kernel;
  const values = new Float64Array(data.length);
  for (let output = 0, from = 0; output < outputs; output++) {
    for (let input = 0; input < inputs; input++) {
      for (let tap = 0; tap < taps; tap++) values[(tap * inputs + input) * outputs + output] = data[from++];
    }
  }
  return { inputs, values };
}

export const transposed = ({ shape, data }) => matrix({ shape: [...shape, 1], data }).values;
