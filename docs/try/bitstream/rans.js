// rANS with a state of 64 bits, words of 32 and frequencies of 16 (the coder of CompressAI, after Duda 2013).
//
// The state is two numbers, `high` and `low`, of 32 bits each. All intermediate results are whole numbers below 2**53,
// which JavaScript's numbers hold exactly. A table is a list of cumulative frequencies: symbol s has
// table[s + 1] - table[s] of 2**16.

import { PayloadError } from "./errors.js";

export const PRECISION = 16;
export const STATE_BYTES = 8; // the final state, first in a payload
const WORD_BYTES = 4;
const WORD = 2 ** 32;
const FEWEST_SYMBOLS = 4; // a shorter payload is filled up with symbols that cost almost nothing
const CERTAIN = [0, 2 ** 16 - 1, 2 ** 16];

/** The length in bytes of the longest payload that is no longer, or of the shortest that there is. */
export const wholeWords = (length) => Math.max(STATE_BYTES, Math.floor(length / WORD_BYTES) * WORD_BYTES);

/** Bytes that so many symbols take at most: a word at most at every second one. */
export const longestPayload = (symbols) => STATE_BYTES + WORD_BYTES * Math.floor((symbols + 1) / 2);

/** Refuse a payload whose length or first state no encoder writes. */
export function checkPayload(payload, smallest, limit, what) {
  if (payload.length % WORD_BYTES || payload.length < smallest || payload.length >= limit) {
    throw new PayloadError(
      `payload has ${payload.length} bytes; ${what} take a multiple of 4 from ${smallest} to ${limit - 1}`,
    );
  }
  if (!isState(readWord(payload, 1), readWord(payload, 0))) {
    throw new PayloadError("payload begins with a coder state that does not exist; allowed: 2**31 to 2**63 - 1");
  }
}

const isState = (high, low) => high < 2 ** 31 && (high > 0 || low >= 2 ** 31);

/** Word `number` of a payload, little-endian; undefined if it is not whole. */
function readWord(payload, number) {
  const at = WORD_BYTES * number;
  if (at + WORD_BYTES > payload.length) return undefined;
  return (payload[at] | (payload[at + 1] << 8) | (payload[at + 2] << 16) | (payload[at + 3] << 24)) >>> 0;
}

/** Decodes the symbols that a payload, or its first bytes, hold; the most probable ones follow where it ends. */
export class Decoder {
  #payload;
  #next = 2;
  #low;
  #high;
  #probable = new Map();

  /** Symbols that were asked for, and how many of them came from the bytes, the first ones. */
  asked = 0;
  known = 0;

  /** @param {Uint8Array} payload */
  constructor(payload) {
    this.#payload = payload;
    this.#low = readWord(payload, 0);
    this.#high = readWord(payload, 1);
    if (this.#high === undefined || !isState(this.#high, this.#low)) this.#low = undefined;
  }

  /** The next symbol, of a table. */
  next(table) {
    this.asked++;
    if (this.#low === undefined) return this.#mostProbable(table);
    const place = this.#low & 0xffff;
    let symbol = 0;
    for (let end = table.length; end - symbol > 1;) {
      const middle = (symbol + end) >> 1;
      if (table[middle] <= place) symbol = middle;
      else end = middle;
    }
    // state = frequency * (state >> 16) + place - start, where state >> 16 is high * 2**16 + (low >>> 16)
    const frequency = table[symbol + 1] - table[symbol];
    const upper = frequency * this.#high;
    const lower = (upper % 65536) * 65536 + frequency * (this.#low >>> 16) + place - table[symbol];
    this.#high = Math.floor(upper / 65536) + Math.floor(lower / WORD);
    this.#low = lower >>> 0;
    if (this.#high === 0 && this.#low < 2 ** 31) {
      this.#high = this.#low;
      this.#low = readWord(this.#payload, this.#next++);
    }
    this.known++;
    return symbol;
  }

  #mostProbable(table) {
    if (!this.#probable.has(table)) {
      let best = 0;
      for (let symbol = 1; symbol + 1 < table.length; symbol++) {
        if (table[symbol + 1] - table[symbol] > table[best + 1] - table[best]) best = symbol;
      }
      this.#probable.set(table, best);
    }
    return this.#probable.get(table);
  }
}

/** Takes symbols in the order in which they will be decoded. */
export class Encoder {
  #starts = [];
  #frequencies = [];

  push(table, symbol) {
    this.#starts.push(table[symbol]);
    this.#frequencies.push(table[symbol + 1] - table[symbol]);
  }

  /** The payload, filled up with zeros to `shortest` bytes. @returns {Uint8Array} */
  finish(shortest = 0) {
    while (this.#starts.length < FEWEST_SYMBOLS) this.push(CERTAIN, 0);
    let high = 0;
    let low = 2 ** 31;
    const words = [];
    for (let number = this.#starts.length - 1; number >= 0; number--) {
      const frequency = this.#frequencies[number];
      if (high >= frequency * 2 ** 15) {
        words.push(low);
        low = high;
        high = 0;
      }
      // state = (state / frequency << 16) + state % frequency + start, by long division in two digits of 32 bits
      const upper = Math.floor(high / frequency);
      const rest = (high - upper * frequency) * WORD + low;
      const lower = Math.floor(rest / frequency);
      high = upper * 65536 + Math.floor(lower / 65536);
      low = (lower % 65536) * 65536 + (rest - lower * frequency) + this.#starts[number];
    }
    words.push(high, low);
    const payload = new Uint8Array(Math.max(shortest, WORD_BYTES * words.length));
    const view = new DataView(payload.buffer);
    words.reverse().forEach((word, number) => view.setUint32(WORD_BYTES * number, word, true));
    return payload;
  }
}

/** Whether two lists of bytes are the same. */
export const sameBytes = (one, other) =>
  one.length === other.length && one.every((byte, place) => byte === other[place]);
