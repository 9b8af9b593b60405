// Which adapter answers which conversation, and how chats ended: node chats.mjs URL prints {conversation: model}.
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { Lorry, LorryError, modelFor } from "./lorry.js";

const [front, key] = [process.argv[2], "acme-key-canary-1"];
const [live, canary] = ["clients/acme/good-1", "clients/acme/good-2"];
const ids = Array.from({ length: 4000 }, (_, i) => (i % 2 ? randomUUID() : `conversation ${i} \u00e4\u{1f6b2}`));
const shareOf = async (share, name = canary) => {
  const all = await Promise.all(ids.map((id) => modelFor({ url: "x", model: live, canary: { model: name, share } }, id)));
  return new Set(ids.filter((_, i) => all[i] === name));
};

// Any share is respected to within five standard deviations, and a larger one keeps what a smaller one had.
let smaller = new Set();
for (const share of [0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1]) {
  const larger = await shareOf(share);
  const spread = Math.sqrt(ids.length * share * (1 - share));
  assert.ok(Math.abs(larger.size - ids.length * share) <= 5 * spread, `${larger.size} of ${ids.length} at ${share}`);
  assert.ok([...smaller].every((id) => larger.has(id)), `a conversation changed its adapter at ${share}`);
  smaller = larger;
}
// Another canary gets other conversations: a tenth of a tenth is the same, not all.
const [one, other] = [await shareOf(0.1), await shareOf(0.1, "clients/acme/good-3")];
assert.ok([...one].filter((id) => other.has(id)).length < 100);

// Through the front door: the same answer each time, from a fresh process too, and while the front door is away.
const lorry = new Lorry({ url: `${front}/v2/lorry`, key });
const chosen = {};
for (const id of ids) chosen[id] = (await lorry.chatFor(id)).model;
const again = new Lorry({ url: `${front}/v2/lorry`, key });
for (const id of ids.slice(0, 50)) assert.equal((await again.chatFor(id)).model, chosen[id]);
assert.equal((await lorry.chatFor("x")).url, "https://llm.example");
assert.equal((await lorry.adapters()).inference.canary.share, 0.2);
const [clock, away, timeout] = [Date.now, globalThis.fetch, AbortSignal.timeout];
const asked = [];
const hangs = (url, { signal }) => {
  asked.push(url);
  return new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
};
const soon = (ms) => {
  assert.equal(ms, 3_000);
  const limit = new AbortController();
  setTimeout(() => limit.abort(), ms / 100);
  return limit.signal;
};

// A front door that hangs: all chats of the moment ask it once, and none waits longer than three seconds.
[globalThis.fetch, AbortSignal.timeout] = [hangs, soon];
const first = new Lorry({ url: `${front}/v2/lorry`, key });
const waited = await Promise.allSettled(ids.slice(0, 9).map((id) => first.chatFor(id)));
assert.deepEqual([waited.every((one) => one.status === "rejected"), asked.length], [true, 1]);
Date.now = () => clock() + 40_000;
const told = await Promise.all(ids.slice(0, 9).map((id) => lorry.chatFor(id)));
assert.deepEqual(told.map((one) => one.model), ids.slice(0, 9).map((id) => chosen[id]));
assert.equal(asked.length, 2);
await lorry.countChat(live, false); // does not throw, nor wait
[globalThis.fetch, AbortSignal.timeout] = [away, timeout];
assert.equal((await first.chatFor(ids[7])).model, chosen[ids[7]]); // asked anew
Date.now = () => clock() + 80_000;
globalThis.fetch = () => Promise.reject(new Error("away"));
assert.equal((await lorry.chatFor(ids[7])).model, chosen[ids[7]]);
await lorry.countChat(live, false); // does not throw
[Date.now, globalThis.fetch] = [clock, away];
const nobody = new Lorry({ url: `${front}/v2/lorry`, key: "brick-key-canary-2" });
await assert.rejects(nobody.chatFor("x"), (error) => error instanceof LorryError && error.status === 422);

// Totals, of one window however late the clock strikes: two failures and two answers; the base is not counted.
const now = clock();
Date.now = () => now;
const counting = new Lorry({ url: `${front}/v2/lorry`, key });
await counting.countChat(live, false);
await counting.countChat(live, false);
await counting.countChat(live, true);
await counting.countChat(live, true);
await counting.countChat(canary, false);
await counting.countChat("lorry/smoke", false);
console.log(JSON.stringify(chosen));
