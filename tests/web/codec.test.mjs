// The page's rate control, with files of known lengths in place of a codec's.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Codec } from "../../docs/try/codec.js";

/** A codec whose file at points[i] has lengths[i] bytes, and how many it made. */
function codecOf(lengths) {
  const codec = Object.create(Codec.prototype);
  codec.bottleneck = { points: lengths.map((_, place) => place + 3) };
  codec.made = 0;
  codec.compress = async (_, point) => {
    codec.made++;
    return new Uint8Array(lengths[point - 3]);
  };
  return codec;
}

for (const [name, lengths, most] of [
  ["many qualities", Array.from({ length: 4096 }, (_, place) => 20 + Math.floor(place ** 1.4 / 40) * 4), 16],
  ["eight rates, of which one costs less than the one below", [21, 34, 60, 83, 75, 91, 111, 147], 8],
]) {
  test(`the highest point that fits, of ${name}`, async () => {
    for (let target = lengths[0]; target < lengths.at(-1) + 5; target += Math.ceil(lengths.at(-1) / 200)) {
      const codec = codecOf(lengths);
      const shares = [];
      const { data, point } = await codec.compressWithin({}, target, (share) => shares.push(share));
      assert.equal(
        point - 3,
        lengths.findLastIndex((length) => length <= target),
      );
      assert.equal(data.length, lengths[point - 3]);
      assert.ok(codec.made <= most && shares.length === codec.made);
      assert.ok(shares.every((share, place) => share <= 1 && share > (shares[place - 1] ?? 0)));
    }
    const line = `${lengths[0] - 1} bytes are too few for this image; reachable: ${lengths[0]} to ${lengths.at(-1)} bytes`;
    await assert.rejects(codecOf(lengths).compressWithin({}, lengths[0] - 1), new RangeError(line));
  });
}
