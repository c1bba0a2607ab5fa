// Codebook indices at fixed length, or by rANS with an integer frequency table (`oscar/bitstream/entropy.py`).

import { Coding } from "./container.js";
import { PayloadError } from "./errors.js";
import { Decoder, Encoder, PRECISION, STATE_BYTES, checkPayload, sameBytes } from "./rans.js";
import { bitsPerPackedIndex, packedLength } from "./rates.js";

/** @typedef {Uint16Array} Indices of a grid in rows, from 0 to K - 1 */

/**
 * Code indices with their frequency table, or at fixed length where that is not longer.
 *
 * @param {Indices} indices
 * @param {Int32Array} frequencies (K,) from 1 on, summing to 2**16 - 1
 * @returns {{coding: number, payload: Uint8Array}}
 */
export function encodeIndices(indices, frequencies) {
  const limit = packedLength(indices.length, frequencies.length);
  if (limit > STATE_BYTES) {
    // rANS never takes less than its state
    const payload = encodeByTable(indices, frequencies);
    if (payload.length < limit) return { coding: Coding.TABLE, payload };
  }
  return { coding: Coding.PACKED, payload: packIndices(indices, frequencies.length) };
}

/**
 * Recover `count` indices of a payload that `encodeIndices` can have written.
 *
 * @throws {PayloadError} for any other
 * @returns {Indices}
 */
export function decodeIndices(payload, coding, count, frequencies) {
  return coding === Coding.PACKED
    ? unpackIndices(payload, count, frequencies.length)
    : decodeByTable(payload, count, frequencies);
}

/** Most significant bit first, zero bits up to a whole byte. */
function packIndices(indices, codebookSize) {
  const bits = bitsPerPackedIndex(codebookSize);
  const payload = new Uint8Array(packedLength(indices.length, codebookSize));
  indices.forEach((index, number) => {
    for (let bit = 0; bit < bits; bit++) {
      const place = number * bits + bit;
      payload[place >> 3] |= ((index >> (bits - 1 - bit)) & 1) << (7 - (place & 7));
    }
  });
  return payload;
}

function unpackIndices(payload, count, codebookSize) {
  const bits = bitsPerPackedIndex(codebookSize);
  const length = packedLength(count, codebookSize);
  if (payload.length !== length) {
    throw new PayloadError(
      `payload has ${payload.length} bytes; ${count} packed indices of ${bits} bits take ${length}`,
    );
  }
  const indices = new Uint16Array(count);
  for (let place = 0; place < count * bits; place++) {
    const number = Math.floor(place / bits);
    indices[number] = (indices[number] << 1) | ((payload[place >> 3] >> (7 - (place & 7))) & 1);
  }
  const largest = indices.reduce((most, index) => Math.max(most, index), 0);
  if (largest >= codebookSize) {
    throw new PayloadError(`payload holds index ${largest}; allowed: 0 to ${codebookSize - 1}`);
  }
  if (!sameBytes(packIndices(indices, codebookSize), payload)) {
    throw new PayloadError("payload has bits set after its last index; allowed: zeros");
  }
  return indices;
}

/** Cumulative frequencies; the last unit is that of a symbol K, which is never written. */
function tableOf(frequencies) {
  const table = [0];
  for (const frequency of frequencies) table.push(table.at(-1) + frequency);
  return [...table, 2 ** PRECISION];
}

function encodeByTable(indices, frequencies) {
  const table = tableOf(frequencies);
  const encoder = new Encoder();
  for (const index of indices) encoder.push(table, index);
  return encoder.finish();
}

function decodeByTable(payload, count, frequencies) {
  checkPayload(payload, STATE_BYTES, packedLength(count, frequencies.length), `${count} indices coded with a table`);
  // The encoder's state starts at 2**31, and no symbol adds less than the most frequent one; 1 % is for roundings.
  const leastBits =
    31 + 0.99 * count * (PRECISION - Math.log2(frequencies.reduce((most, each) => Math.max(most, each))));
  if (8 * payload.length < leastBits) {
    throw new PayloadError(
      `payload has ${payload.length} bytes; ${count} indices cannot be coded in fewer than ${Math.ceil(leastBits / 8)}`,
    );
  }
  const table = tableOf(frequencies);
  const decoder = new Decoder(payload);
  const indices = Uint16Array.from({ length: count }, () => decoder.next(table));
  if (indices.includes(frequencies.length) || !sameBytes(encodeByTable(indices, frequencies), payload)) {
    throw new PayloadError(`payload of ${payload.length} bytes is not a coding of ${count} indices with this table`);
  }
  return indices;
}
