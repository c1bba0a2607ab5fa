// A latent coded with a mean-scale hyperprior and context from channels and a checkerboard, all in integers
// (`oscar/bitstream/hyperprior.py`).
//
// Side information z is coded first, position by position with a fixed table for each channel. Two convolutions turn it
// into features. Then the latent's channels are coded group by group, and each group in two passes over the grid: first
// the positions whose row and column have an even sum, then the others. For a pass a small network, which sees the
// features and all that is known so far, tells the mean and the scale of each symbol.
//
// Activations, means and decoded values are in units of 2**-6, weights of 2**-10, sums and biases of 2**-16. Sums are
// below 2**53, so that JavaScript's numbers hold them exactly.

import { PayloadError } from "./errors.js";
import { Field, LOWEST, activate, addProducts, clip, matrix, transposed, upsample } from "./layers.js";
import { Decoder, Encoder, checkPayload, longestPayload, sameBytes, wholeWords } from "./rans.js";

export const STEPS = 64; // that make 1
const MAX_CODE = 4095;
const KNOTS = 8;
const SCALES = 64;
const REACH = 2;
const POSITIONS_PER_BYTE = 64; // at most

/** Rows and columns of z for those of the latent. @returns {[number, number]} */
export const sideShape = ([rows, columns]) => [Math.ceil(rows / 4), Math.ceil(columns / 4)];

/**
 * @typedef {object} Coded
 * @property {Uint8Array} tables of each symbol, in the order of coding: z's channels, then the scales
 * @property {Int16Array} symbols
 */

/** Codes latents of C channels with Z channels of side information. */
export class HyperpriorCoder {
  /** @param {(name: string) => import("../safetensors.js").Tensor} array of the checkpoint, by name */
  constructor(array) {
    this.groups = Array.from(array("groups").data);
    this.channels = this.groups.reduce((sum, size) => sum + size, 0);
    const side = array("side_frequencies");
    this.sideChannels = side.shape[0];
    this.tables = [...tablesOf(side), ...tablesOf(array("scale_frequencies"))];
    this.up1 = { weights: matrix(array("up1")), bias: array("up1_bias") };
    this.up2 = { weights: matrix(array("up2")), bias: array("up2_bias") };
    this.predictors = this.groups.map((size, group) => ({
      known: matrix(array(`known.${group}`)),
      side: transposed(array(`side.${group}`)),
      firstBias: array(`first_bias.${group}`),
      middle: transposed(array(`middle.${group}`)),
      middleBias: array(`middle_bias.${group}`).data,
      last: transposed(array(`last.${group}`)),
      lastBias: array(`last_bias.${group}`).data,
    }));
  }

  /**
   * The symbols nearest to a latent, and what the decoder makes of them.
   *
   * @param {Float32Array} y (C, h, w), in steps of the symbols
   * @param {ArrayLike<number>} z (Z, hz, wz), clipped to its tables' ranges
   * @param {[number, number]} shape h and w
   * @param {number} code the quality, 0 to 4095
   * @returns {{coded: Coded, values: Int32Array}} values (C, h, w) in units of 2**-6
   */
  choose(y, z, shape, code) {
    const positions = shape[0] * shape[1];
    const sidePositions = z.length / this.sideChannels;
    return this.#follow(shape, code, (table, channel, position, mean) => {
      const wanted =
        mean === null
          ? z[channel * sidePositions + position]
          : roundHalfEven(y[channel * positions + position] - mean / STEPS);
      const { lowest, cumulative } = this.tables[table];
      return Math.max(lowest, Math.min(lowest + cumulative.length - 2, wanted));
    });
  }

  /** The payload of symbols that `choose` or `read` gave. @returns {Uint8Array} */
  write({ tables, symbols }, shape) {
    const encoder = new Encoder();
    symbols.forEach((symbol, number) => {
      const { lowest, cumulative } = this.tables[tables[number]];
      encoder.push(cumulative, symbol - lowest);
    });
    return encoder.finish(shortest(shape));
  }

  /**
   * Symbols and values of a payload that `write` can have written.
   *
   * @throws {PayloadError} for any other
   * @returns {{coded: Coded, values: Int32Array}}
   */
  read(payload, shape, code) {
    checkPayload(payload, shortest(shape), longestPayload(this.#count(shape)) + 1, `${shape.join("x")} positions`);
    const { coded, values } = this.readPrefix(payload, shape, code);
    if (!sameBytes(this.write(coded, shape), payload)) {
      throw new PayloadError(`payload of ${payload.length} bytes is not a coding of ${shape.join("x")} positions`);
    }
    return { coded, values };
  }

  /** The same of a payload's first bytes, with guesses of the rest, and the share of the symbols that was read. */
  readPrefix(payload, shape, code) {
    const decoder = new Decoder(payload);
    const found = this.#follow(shape, code, (table) => {
      const { lowest, cumulative } = this.tables[table];
      return decoder.next(cumulative) + lowest;
    });
    return { ...found, share: decoder.known / decoder.asked };
  }

  #count(shape) {
    const [rows, columns] = sideShape(shape);
    return rows * columns * this.sideChannels + shape[0] * shape[1] * this.channels;
  }

  /** Go through z and the latent in the order of coding; `give` tells each symbol, with mean null for z. */
  #follow(shape, code, give) {
    const coded = { tables: new Uint8Array(this.#count(shape)), symbols: new Int16Array(this.#count(shape)) };
    let number = 0;
    const next = (table, channel, position, mean) => {
      const symbol = give(table, channel, position, mean);
      coded.tables[number] = table;
      coded.symbols[number++] = symbol;
      return symbol;
    };
    const [sideRows, sideColumns] = sideShape(shape);
    const z = new Float64Array(sideRows * sideColumns * this.sideChannels);
    for (let place = 0; place < z.length; place++) {
      const channel = place % this.sideChannels;
      z[place] = next(channel, channel, (place - channel) / this.sideChannels, null) * STEPS;
    }
    const features = this.#features(z, shape, code);
    const known = new Field(shape[0], shape[1], this.channels, REACH);
    let start = 0;
    this.groups.forEach((size, group) => {
      for (const pass of [0, 1]) {
        // The first pass sees other groups only, the second the first half of its own too.
        const predict = this.#predictor(group, pass, code, known, start + pass * size, features);
        const found = [];
        for (let row = 0; row < shape[0]; row++) {
          for (let column = (row + pass) % 2; column < shape[1]; column += 2) {
            const position = row * shape[1] + column;
            const outputs = predict(position, known.place(row, column));
            for (let own = 0; own < size; own++) {
              const mean = outputs[own];
              const level = Math.max(0, Math.min(SCALES - 1, Math.floor((outputs[size + own] + STEPS / 2) / STEPS)));
              found.push(clip(next(this.sideChannels + level, start + own, position, mean) * STEPS + mean, LOWEST));
            }
          }
        }
        let place = 0; // positions of one pass do not see each other, so they are written behind it
        for (let row = 0; row < shape[0]; row++) {
          for (let column = (row + pass) % 2; column < shape[1]; column += 2) {
            const at = known.place(row, column) + start;
            for (let own = 0; own < size; own++) known.values[at + own] = found[place++];
          }
        }
      }
      start += size;
    });
    return { coded, values: known.byChannel() };
  }

  /** What z (hz * wz, Z) says of each position, (h * w, P). */
  #features(z, shape, code) {
    let grid = { rows: sideShape(shape)[0], columns: sideShape(shape)[1], channels: this.sideChannels, values: z };
    grid = upsample(grid, this.up1.weights, atQuality(this.up1.bias.data, this.up1.bias.shape[1], code));
    grid = upsample(grid, this.up2.weights, this.up2.bias.data);
    const result = new Float64Array(shape[0] * shape[1] * grid.channels);
    for (let row = 0; row < shape[0]; row++) {
      const start = row * grid.columns * grid.channels;
      const part = grid.values.subarray(start, start + shape[1] * grid.channels);
      result.set(part, row * shape[1] * grid.channels);
    }
    return result;
  }

  /** A function that tells means and scales, (2 * c,), of a group's pass at a position. */
  #predictor(group, pass, code, known, seen, features) {
    const own = this.predictors[group];
    const hidden = own.middleBias.length;
    const inputs = features.length / (known.rows * known.columns);
    const bias = atQuality(own.firstBias.data.subarray(pass * KNOTS * hidden), hidden, code);
    const [first, second, last] = [hidden, hidden, own.lastBias.length].map((size) => new Float64Array(size));
    return (position, place) => {
      first.set(bias);
      known.addProducts(first, place, seen, own.known);
      addProducts(first, features, position * inputs, inputs, own.side, 0);
      activate(first, 0);
      second.set(own.middleBias);
      addProducts(second, first, 0, hidden, own.middle, 0);
      activate(second, 0);
      last.set(own.lastBias);
      addProducts(last, second, 0, hidden, own.last, 0);
      return activate(last, LOWEST);
    };
  }
}

/** Biases between the two knots next to a quality, of (8, size). */
function atQuality(knots, size, code) {
  const knot = Math.floor(((KNOTS - 1) * code) / MAX_CODE);
  const rest = ((KNOTS - 1) * code) % MAX_CODE;
  const above = Math.min(knot + 1, KNOTS - 1);
  return Float64Array.from({ length: size }, (_, place) =>
    Math.floor((knots[knot * size + place] * (MAX_CODE - rest) + knots[above * size + place] * rest) / MAX_CODE),
  );
}

/** Of frequencies (tables, 2 * R + 1), centred at 0: cumulative ones, and the symbol of the first. */
function tablesOf({ shape: [count, width], data }) {
  return Array.from({ length: count }, (_, row) => {
    const frequencies = data.subarray(row * width, (row + 1) * width);
    const first = frequencies.findIndex((frequency) => frequency > 0);
    const cumulative = [0];
    for (const frequency of frequencies.subarray(first)) {
      if (frequency) cumulative.push(cumulative.at(-1) + frequency);
    }
    return { lowest: first - (width - 1) / 2, cumulative };
  });
}

function roundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return below + (rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? 1 : 0);
}

const shortest = (shape) => wholeWords(Math.floor((shape[0] * shape[1]) / POSITIONS_PER_BYTE));
