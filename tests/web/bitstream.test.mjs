// The page's bitstream against the golden files: equal symbols, equal bytes, and named errors only.
// `node --test tests/web` runs it.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";
import { test } from "node:test";

import { Coding, crc32, hasIndices, pack, unpack } from "../../docs/try/bitstream/container.js";
import { BitstreamError } from "../../docs/try/bitstream/errors.js";
import { HyperpriorCoder, sideShape } from "../../docs/try/bitstream/hyperprior.js";
import { quantiseRms } from "../../docs/try/bitstream/norms.js";
import { Decoder, Encoder } from "../../docs/try/bitstream/rans.js";
import { Codec } from "../../docs/try/codec.js";
import { Tensors } from "../../docs/try/safetensors.js";
import { channelRms } from "../../docs/try/tensors.js";

const ROOT = new URL("../..", import.meta.url).pathname;
const GOLDEN = join(ROOT, "tests/golden");
const DAMAGED = 500;

const FACTORS = { nano: 16 }; // pixels per latent position

/** Model folders by name, and the folders of their files. */
const MODELS = {
  "nano-vq": [join(ROOT, "oscar/assets/nano-vq"), join(GOLDEN, "shipped/nano-vq")],
  nano: [join(ROOT, "oscar/assets/nano"), join(GOLDEN, "shipped/nano")],
  vq: [join(GOLDEN, "ours/vq"), join(GOLDEN, "ours/files/vq")],
  hyperprior: [join(GOLDEN, "ours/hyperprior"), join(GOLDEN, "ours/files/hyperprior")],
};

const read = (path) => new Uint8Array(readFileSync(path));

function load(name) {
  const [folder, files] = MODELS[name];
  const config = JSON.parse(readFileSync(join(folder, "oscar.json")));
  const tensors = new Tensors(read(join(folder, "oscar.safetensors")));
  const codec = new Codec(config, { factor: FACTORS[name] ?? 8 }, tensors, () => assert.fail("no network is needed"));
  const expected = new Tensors(read(join(files, "arrays.safetensors")));
  const paths = readdirSync(files)
    .filter((path) => path.endsWith(".oscar"))
    .sort();
  const cases = paths.map((path) => ({ name: basename(path, ".oscar"), data: read(join(files, path)) }));
  assert.ok(cases.length >= 6);
  return { codec, expected, cases };
}

/** Numbers from 0 to 1, the same in every run (mulberry32). */
function randomNumbers(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let value = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value;
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Codes of the points where files are written unless something else is asked for: rates 0.0430 and 0.0625, quality 0.5. */
const DEFAULT_POINTS = { "nano-vq": 3, vq: 4, nano: 2048, hyperprior: 2048 };

for (const name of Object.keys(MODELS)) {
  const { codec, expected, cases } = load(name);

  test(`${name}: the default point`, () => assert.equal(codec.bottleneck.defaultPoint, DEFAULT_POINTS[name]));

  for (const { name: path, data } of cases) {
    test(`${name}/${path}: equal symbols, and equal bytes from them`, async () => {
      const container = await codec.open(data);
      assert.deepEqual(pack(container), data);
      const symbols = codec.read(container);
      assert.deepEqual(Int32Array.from(symbols.grid ?? symbols.values), expected.get(`${path}.symbols`).data);
      const { coding, side, payload } = codec.bottleneck.write(symbols, container.pointCode);
      assert.deepEqual(pack({ ...container, coding, side, payload }), data);
      const { share, ...all } =
        container.coding < Coding.CONTEXT ? { share: 1, ...symbols } : codec.readPrefix(container);
      assert.equal(share, 1);
      assert.deepEqual(all, symbols);
    });

    test(`${name}/${path}: equal bytes from the latent`, async () => {
      const container = await codec.open(data);
      const {
        shape: [, channels, height, width],
        data: latent,
      } = expected.get(`${path}.latent`);
      if (hasIndices(container.coding)) {
        assert.deepEqual(
          Uint8Array.from(channelRms({ channels, height, width, data: latent }), quantiseRms),
          container.side,
        );
        return;
      }
      const { coder } = codec.bottleneck;
      const { coded } = codec.read(container);
      const [rows, columns] = sideShape([height, width]);
      const z = Int16Array.from({ length: rows * columns * coder.sideChannels }, (_, place) => {
        const [channel, position] = [Math.floor(place / (rows * columns)), place % (rows * columns)];
        return coded.symbols[position * coder.sideChannels + channel];
      });
      const run = async () => ({
        channels: coder.sideChannels,
        height: rows,
        width: columns,
        data: Float32Array.from(z),
      });
      codec.bottleneck.sideGains = { shape: [2, coder.sideChannels], data: new Float32Array(2 * coder.sideChannels) };
      const symbols = await codec.bottleneck.quantise(
        { channels, height, width, data: latent },
        container.pointCode,
        run,
      );
      assert.deepEqual(symbols.coded, coded);
      assert.deepEqual(codec.bottleneck.write(symbols).payload, container.payload);
    });
  }

  test(`${name}: ${DAMAGED} damaged files give named errors`, async () => {
    const random = randomNumbers(1);
    const below = (limit) => Math.floor(random() * limit);
    const kinds = {};
    for (let number = 0; number < DAMAGED; number++) {
      let data = Uint8Array.from(cases[number % cases.length].data);
      const original = Uint8Array.from(data);
      const way = below(3);
      if (way === 0) data = data.slice(0, below(data.length));
      else for (let change = 0; change <= below(4); change++) data[below(data.length)] ^= 1 << below(8);
      if (way === 2) mend(data); // so that more than the checksum is asked
      try {
        const container = await codec.open(data);
        codec.read(container);
        assert.ok(way === 2 || Buffer.compare(data, original) === 0, "damage was not noticed");
      } catch (error) {
        if (!(error instanceof BitstreamError)) throw error;
        assert.match(error.message, /^[^\n]+$/);
        kinds[error.name] = (kinds[error.name] ?? 0) + 1;
      }
    }
    assert.ok(kinds.ChecksumError > 50 && kinds.PayloadError > 20 && kinds.WrongModelError > 5, JSON.stringify(kinds));
  });

  test(`${name}: the first bytes show more and more`, async () => {
    const coded = cases.filter(({ data }) => [Coding.CONTEXT, Coding.HYPERPRIOR].includes((data[2] >> 4) & 7));
    const { data } = coded.reduce((longest, each) => (each.data.length > longest.data.length ? each : longest));
    const shares = [];
    for (const part of [0.3, 0.6, 0.9]) {
      const container = await codec.open(data.slice(0, Math.ceil(data.length * part)), false);
      shares.push(codec.readPrefix(container).share);
    }
    assert.ok(shares[0] < shares[1] && shares[1] < shares[2] && shares[2] < 1, shares.join());
  });
}

test("files with timesteps of their own", () => {
  const folder = join(GOLDEN, "ours/files/vq_per_image");
  for (const path of readdirSync(folder).filter((name) => name.endsWith(".oscar"))) {
    const container = unpack(read(join(folder, path)));
    assert.ok(container.timestep >= 0);
    assert.deepEqual(pack(container), read(join(folder, path)));
  }
});

/** Write the right checksum into a file whose header still says where it is. */
function mend(data) {
  try {
    unpack(data, false);
  } catch {
    return;
  }
  const indices = ((data[2] >> 4) & 7) < 3;
  let place = indices ? 5 : 6;
  for (let varints = 0; varints < 2; place++) if (data[place] < 0x80) varints++;
  place += (indices ? 4 : 0) + (data[2] >> 7);
  const crc = crc32(data.subarray(0, place), data.subarray(place + 3));
  data.set([(crc >> 16) & 255, (crc >> 8) & 255, crc & 255], place);
}

test("rANS gives back what it was given, also at the edges of its state", () => {
  const random = randomNumbers(2);
  for (let round = 0; round < 200; round++) {
    const cuts = new Set([0, 65536]);
    for (let cut = 0; cut < 1 + (round % 40); cut++) cuts.add(Math.floor(65536 * random() ** (1 + (round % 5) * 3)));
    const table = [...cuts].sort((one, other) => one - other);
    const symbols = Array.from({ length: 4 + round * 3 }, () => Math.floor(random() * (table.length - 1)));
    const encoder = new Encoder();
    for (const symbol of symbols) encoder.push(table, symbol);
    const payload = encoder.finish();
    const decoder = new Decoder(payload);
    assert.deepEqual(
      symbols.map(() => decoder.next(table)),
      symbols,
    );
    assert.equal(decoder.known, symbols.length);
  }
});
