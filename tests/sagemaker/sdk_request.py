"""Prints what the SDK makes of the request on standard input; runs in the environment that holds the SDK.

python sdk_request.py < request.json > body.json
"""

import json
import logging
import sys

from scripts.backends.sagemaker_sdk import through_sdk

logging.disable(logging.CRITICAL)
request = json.load(sys.stdin)
body = through_sdk(request)
sys.stdout.write("\nBODY " + json.dumps(body))
