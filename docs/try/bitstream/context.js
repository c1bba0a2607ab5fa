// Indices predicted from neighbours that are coded before them, and coded with these predictions
// (`oscar/bitstream/context.py`).
//
// A grid is coded from coarse to fine: first every eighth row and column, then the lattice between them, halved in
// three passes per step. Each position sees the nearest ones of earlier passes; a small network turns their codes into
// features. An index is the path to a leaf of a binary tree, whose every node decides by the product of its own vector
// with the features; a table has the probability of each product. All numbers are integers.

import { Coding } from "./container.js";
import { PayloadError } from "./errors.js";
import { encodeIndices, decodeIndices } from "./indices.js";
import { Decoder, Encoder, checkPayload, sameBytes, wholeWords } from "./rans.js";
import { bitsPerPackedIndex, packedLength } from "./rates.js";

const TOP_LEVEL = 80;
const PART = 4096; // positions whose decisions are coded node by node together
const SMALLEST_SHARE = 64; // a payload is no shorter than the packed one by more

/** Positions that are coded together: one of every `step` rows and columns from the first, and their set of weights. */
const PASSES = [
  { row: 0, column: 0, step: 8, weights: 3 },
  ...[8, 4, 2].flatMap((step) =>
    [
      [0, 1],
      [1, 0],
      [1, 1],
    ].map(([row, column], which) => ({
      row: (row * step) / 2,
      column: (column * step) / 2,
      step,
      weights: which + (step > 2 ? 3 : 0),
    })),
  ),
];

/** Tables of a decision by level, whose log-odds are (level - 80) / 8: zero, one, and a unit that is never used. No
 * share is so near a half of a unit that an engine's own exponential function could decide how it is rounded. */
export const DECISIONS = Array.from({ length: 2 * TOP_LEVEL + 1 }, (_, level) => {
  const zero = Math.round((2 ** 16 - 1) / (1 + Math.exp((level - TOP_LEVEL) / 8)));
  return [0, zero, 2 ** 16 - 1, 2 ** 16];
});

/** The `count` nearest positions of earlier passes, rows and columns from one of pass `number`. */
function offsets(number, count) {
  if (number === 0) return Array(count).fill([0, 0]); // itself, not yet known
  const { row, column, step } = PASSES[number];
  const half = step / 2;
  const phases = [
    [0, 0],
    [0, half],
    [half, 0],
    [half, half],
  ].map(String);
  const known = phases.slice(0, phases.indexOf(String([row, column])));
  const modulo = (value) => ((value % step) + step) % step;
  const found = [];
  for (let down = -6; down <= 6; down++) {
    for (let right = -6; right <= 6; right++) {
      const phase = [modulo(row + half * down), modulo(column + half * right)];
      if (known.includes(String(phase))) found.push([half * down, half * right]);
    }
  }
  const distance = ([down, right]) => down * down + right * right;
  return found.sort((a, b) => distance(a) - distance(b) || a[0] - b[0] || a[1] - b[1]).slice(0, count);
}

/** The predictor of one rate's K indices. */
export class ContextModel {
  /** Arrays of a checkpoint in the order in which they enter the digest. */
  static NAMES = ["leaf", "embedding", "hidden", "hidden_bias", "mixing", "mixing_bias", "nodes", "node_bias"];

  /** @param {Record<string, import("../safetensors.js").Tensor>} arrays by `NAMES` */
  constructor(arrays) {
    this.arrays = arrays;
    this.codes = arrays.leaf.shape[0];
    this.depth = bitsPerPackedIndex(this.codes);
    this.codeOfLeaf = new Int32Array(2 ** this.depth).fill(-1);
    arrays.leaf.data.forEach((leaf, code) => (this.codeOfLeaf[leaf] = code));
    const neighbours = arrays.hidden.shape[1] / arrays.embedding.shape[1];
    this.offsets = PASSES.map((_, number) => offsets(number, neighbours));
  }

  /** What the tree decides by at a position of a pass, from the codes around it. */
  features(number, around) {
    const { embedding, hidden, hidden_bias, mixing, mixing_bias } = this.arrays;
    const width = embedding.shape[1];
    const inputs = [];
    for (const code of around) {
      for (let place = 0; place < width; place++) inputs.push(embedding.data[code * width + place]);
    }
    const set = PASSES[number].weights;
    return layer(layer(inputs, hidden, hidden_bias, set, number), mixing, mixing_bias, set, number);
  }

  /** Level of the decision at a node. */
  level(features, node) {
    const { nodes, node_bias } = this.arrays;
    let sum = node_bias.data[node];
    for (let place = 0; place < features.length; place++)
      sum += features[place] * nodes.data[node * features.length + place];
    return Math.max(-TOP_LEVEL, Math.min(TOP_LEVEL, (sum + 64) >> 7)) + TOP_LEVEL;
  }

  /** Bytes that a payload has at least. */
  shortest(count) {
    return wholeWords(Math.floor(packedLength(count, this.codes) / SMALLEST_SHARE));
  }

  /**
   * Go through a grid in the order of coding.
   *
   * @param {[number, number]} shape rows and columns
   * @param {(table: number[], position: number, depth: number) => number} decide gives the bit of each decision
   * @returns {Uint16Array} the codes of the grid
   */
  walk([rows, columns], decide) {
    const grid = new Uint16Array(rows * columns).fill(this.codes); // K stands for a code that is not known
    PASSES.forEach(({ row, column, step }, number) => {
      const positions = [];
      for (let y = row; y < rows; y += step)
        for (let x = column; x < columns; x += step) positions.push(y * columns + x);
      for (let start = 0; start < positions.length; start += PART) {
        const part = positions.slice(start, start + PART);
        const features = part.map((position) =>
          this.features(number, this.around(grid, rows, columns, number, position)),
        );
        const paths = new Uint32Array(part.length);
        for (let depth = 0; depth < this.depth; depth++) {
          part.forEach((position, place) => {
            const level = this.level(features[place], 2 ** depth - 1 + paths[place]);
            paths[place] = 2 * paths[place] + decide(DECISIONS[level], position, depth);
          });
        }
        part.forEach((position, place) => {
          const code = this.codeOfLeaf[paths[place]];
          if (code < 0) throw new PayloadError(`payload holds leaf ${paths[place]}; allowed: 0 to ${this.codes - 1}`);
          grid[position] = code;
        });
      }
    });
    return grid;
  }

  around(grid, rows, columns, number, position) {
    const y = Math.floor(position / columns);
    const x = position % columns;
    return this.offsets[number].map(([down, right]) => {
      const [row, column] = [y + down, x + right];
      const isInside = row >= 0 && row < rows && column >= 0 && column < columns;
      return isInside ? grid[row * columns + column] : this.codes;
    });
  }

  encode(grid, shape) {
    const encoder = new Encoder();
    this.walk(shape, (table, position, depth) => {
      const bit = (this.arrays.leaf.data[grid[position]] >> (this.depth - 1 - depth)) & 1;
      encoder.push(table, bit);
      return bit;
    });
    return encoder.finish(this.shortest(grid.length));
  }

  /** The grid of a payload or of its first bytes, and the share of the decisions that was read. */
  decode(payload, shape) {
    const decoder = new Decoder(payload);
    const grid = this.walk(shape, (table) => {
      const bit = decoder.next(table);
      if (bit > 1) throw new PayloadError("payload holds decision 2; allowed: 0, 1");
      return bit;
    });
    return { grid, share: decoder.known / decoder.asked };
  }
}

/** Activations of a layer, in sixteenths from 0 to 255; weights are 64ths. */
function layer(inputs, weights, biases, set, number) {
  const [, rows, columns] = weights.shape;
  const sums = Array.from({ length: columns }, (_, column) => biases.data[number * columns + column]);
  for (let row = 0; row < rows; row++) {
    const start = (set * rows + row) * columns;
    for (let column = 0; column < columns; column++) sums[column] += inputs[row] * weights.data[start + column];
  }
  return sums.map((sum) => Math.max(0, Math.min(255, (sum + 32) >> 6)));
}

/**
 * Code indices by context, with their frequency table or at fixed length, whichever is shortest.
 *
 * @param {Uint16Array} grid in rows
 * @param {[number, number]} shape rows and columns
 * @param {Int32Array} frequencies of the rate
 * @param {ContextModel} [model] of the rate; without one there is no context coding
 * @returns {{coding: number, payload: Uint8Array}}
 */
export function encodeGrid(grid, shape, frequencies, model) {
  const coded = encodeIndices(grid, frequencies);
  if (!model || model.shortest(grid.length) >= coded.payload.length) return coded;
  const payload = model.encode(grid, shape);
  return payload.length < coded.payload.length ? { coding: Coding.CONTEXT, payload } : coded;
}

/**
 * Recover the indices of a payload that `encodeGrid` can have written.
 *
 * @throws {PayloadError} for any other
 * @returns {Uint16Array}
 */
export function decodeGrid(payload, coding, shape, frequencies, model) {
  const count = shape[0] * shape[1];
  if (coding !== Coding.CONTEXT) return decodeIndices(payload, coding, count, frequencies);
  if (!model) throw new PayloadError("payload has coding context; this model has no context model for this rate");
  const limit = packedLength(count, model.codes);
  checkPayload(payload, model.shortest(count), limit, `${count} indices coded by context`);
  const { grid } = model.decode(payload, shape);
  if (!sameBytes(model.encode(grid, shape), payload)) {
    throw new PayloadError(`payload of ${payload.length} bytes is not a coding of ${count} indices by context`);
  }
  return grid;
}
