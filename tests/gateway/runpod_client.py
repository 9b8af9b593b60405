"""The unmodified `runpod` client against a front door: python runpod_client.py JOB.json; prints what it saw as JSON.

RUNPOD_ENDPOINT_BASE_URL must be set before the import.
"""

import json
import sys
import time

import runpod

runpod.api_key = "acme-key-canary-1"
endpoint = runpod.Endpoint("lorry")
value = json.loads(sys.argv[1])
seen = {}
job = endpoint.run({"input": value})
seen["id"] = job.job_id
seen["first"] = job.status()
seen["streamed"] = [chunk["progress"] for chunk in job.stream()]
seen["output"] = job.output(timeout=150)
seen["last"] = job.status()
seen["health"] = endpoint.health()
seen["sync"] = endpoint.run_sync({"input": value | {"job_id": "sync-1"}}, timeout=150)["progress"]
long = endpoint.run({"input": value | {"job_id": "long-1"}})
while long.status() != "IN_PROGRESS":
    time.sleep(0.2)
seen["cancelled"] = long.cancel(timeout=60)["status"]
seen["after"] = long.status()
seen["purged"] = endpoint.purge_queue(timeout=60)
runpod.api_key = None
try:
    runpod.Endpoint("lorry", api_key="wrong").health()
except RuntimeError as error:
    seen["wrong"] = str(error)
print(json.dumps(seen))
