"""The unmodified `runpod` client, plain and asyncio: python foreign_client.py ENDPOINT KEY; prints what it saw as JSON.

RUNPOD_ENDPOINT_BASE_URL must be set before the import.
"""

import asyncio
import json
import sys
import time

import aiohttp
import runpod

name, runpod.api_key = sys.argv[1:]
endpoint = runpod.Endpoint(name)
seen = {"sync": endpoint.run_sync({"input": {"steps": 1}}, timeout=120)}


def until(job, *statuses):
    give_up = time.monotonic() + 120
    while job.status() not in statuses:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return job.status()


long = endpoint.run({"input": {"steps": 5000}, "policy": {"executionTimeout": 600_000, "ttl": 3_600_000}})
until(long, "IN_PROGRESS")
waiting = endpoint.run({"input": {"steps": 5000}})
seen["queued"] = waiting.status()
seen["purged"] = endpoint.purge_queue(timeout=30)
seen["after purge"] = waiting.status()
seen["cancelled"] = long.cancel(timeout=30)["status"]
bad = endpoint.run({"input": {"boom": True}})
seen["bad"] = until(bad, "FAILED", "COMPLETED")
seen["health"] = endpoint.health(timeout=30)


async def ask():
    async with aiohttp.ClientSession() as session:
        own = runpod.AsyncioEndpoint(name, session)
        job = await own.run({"steps": 2})
        seen["async"] = await job.output(timeout=120)
        other = await own.run({"steps": 5000})
        while await other.status() != "IN_PROGRESS":
            await asyncio.sleep(0.05)
        seen["async cancelled"] = (await other.cancel())["status"]


asyncio.run(ask())
seen["bad id"] = bad.job_id
try:
    runpod.Endpoint(name, api_key="wrong").health(timeout=30)
except RuntimeError as error:
    seen["wrong"] = str(error)
print(json.dumps(seen))
