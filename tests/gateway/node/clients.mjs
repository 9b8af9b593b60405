// Unmodified clients of others and our own compiled one, against a front door: node clients.mjs URL JOB.json WEBHOOK.json
import assert from "node:assert/strict";
import OpenAI from "openai";
import runpodSdk from "runpod-sdk";
import { Lorry, LorryError, verifyWebhook } from "./lorry.js";

const [front, input, webhook] = [process.argv[2], JSON.parse(process.argv[3]), JSON.parse(process.argv[4])];
const key = "acme-key-canary-1";
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// runpod-sdk
const endpoint = runpodSdk(key, { baseUrl: `${front}/v2` }).endpoint("lorry");
const run = await endpoint.run({ input: { ...input, job_id: "npm-1" } }, 20000);
assert.equal(run.id, "npm-1");
let status = await endpoint.status(run.id, 20000);
while (!["COMPLETED", "FAILED"].includes(status.status)) {
  await pause(200);
  status = await endpoint.status(run.id, 20000);
}
assert.equal(status.status, "COMPLETED", JSON.stringify(status));
assert.ok((await fetch(status.output.model_files["manifest.json"])).ok);
const sync = await endpoint.runSync({ input: { ...input, job_id: "npm-2" } }, 60000);
assert.equal(sync.status, "COMPLETED");
assert.equal((await endpoint.health(20000)).jobs.completed, 2);
await endpoint.run({ input: { ...input, job_id: "long-1" } }, 20000);
assert.equal((await endpoint.cancel("long-1", 20000)).status, "CANCELLED");
await assert.rejects(endpoint.status("nobody", 20000), (error) => error.response.status === 404);

// openai
const openai = new OpenAI({ baseURL: `${front}/v1`, apiKey: key, maxRetries: 0 });
const set = await (await fetch(input.dataset_url)).text();
const file = await openai.files.create({ file: new File([set], "set.jsonl"), purpose: "fine-tune" });
const job = await openai.fineTuning.jobs.create({ model: "lorry/smoke", training_file: file.id });
assert.equal(job.object, "fine_tuning.job");
const held = await fetch(`${front}/v2/lorry/status-sync/${job.id}?wait=60000`, { headers: { Authorization: `Bearer ${key}` } });
assert.equal((await held.json()).status, "COMPLETED");
assert.equal((await openai.fineTuning.jobs.retrieve(job.id)).status, "succeeded");
const events = [];
for await (const event of openai.fineTuning.jobs.listEvents(job.id)) events.push(event.message);
assert.equal(events.at(-1), "Created fine-tuning job");
await assert.rejects(openai.fineTuning.jobs.retrieve("nobody"), /no such job/);

// our own
const lorry = new Lorry({ url: `${front}/v2/lorry/`, key });
const quote = await lorry.quote(input);
assert.ok(quote.total_steps > 0);
const mine = await lorry.submit({ ...input, job_id: "own-1" });
assert.equal(mine.understood.epochs, 2);
assert.equal((await lorry.submit({ ...input, job_id: "own-1" })).id, "own-1");
const seen = [];
for await (const event of lorry.stream("own-1")) seen.push(event);
assert.equal(seen.at(-1).event, "end");
assert.equal(seen.at(-1).data.status, "COMPLETED");
const done = await lorry.status("own-1");
assert.equal(done.output.progress, 100);
assert.equal(done.cost.cap_usd, 0);
await assert.rejects(
  lorry.submit({ ...input, job_id: "own-1", hyperparameters: { epochs: 9 } }),
  (error) => error instanceof LorryError && error.status === 409 && error.code === "conflict" && error.problems.length === 1,
);
await lorry.submit({ ...input, job_id: "long-2" });
assert.equal((await lorry.cancel("long-2")).status, "CANCELLED");
await assert.rejects(lorry.retry("own-1"), /it is COMPLETED/);
const stranger = new Lorry({ url: `${front}/v2/lorry`, key: "wrong" });
await assert.rejects(async () => {
  for await (const event of stranger.stream("own-1")) assert.fail(event);
}, /not the key of any client/);

// webhooks, as the front door's side signs them
const headers = new Headers(webhook.headers);
const now = Number(headers.get("lorry-timestamp"));
const good = await verifyWebhook(headers, webhook.body, webhook.secret, { now });
assert.deepEqual([good.delivery, good.message.status], ["job-1.completed", "COMPLETED"]);
for (const [changed, said] of [
  [() => verifyWebhook(headers, webhook.body + " ", webhook.secret, { now }), /signature is wrong/],
  [() => verifyWebhook(headers, webhook.body, "another", { now }), /signature is wrong/],
  [() => verifyWebhook(headers, webhook.body, webhook.secret, { now: now + 301 }), /too old/],
  [() => verifyWebhook(new Headers(), webhook.body, webhook.secret), /not signed/],
]) {
  await assert.rejects(changed, said);
}
console.log("all well");
