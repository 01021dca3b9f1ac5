"""A cloud's notice that it will take the machine back, polled beside training."""

import http.client
import threading
import urllib.request
from urllib.parse import urljoin

AWS = "http://169.254.169.254/latest/meta-data/spot/instance-action"
POLL_SECONDS = 5  # as AWS recommends; its notice comes two minutes ahead
ANSWER_SECONDS = 2


def watch(url, hear, poll_seconds=POLL_SECONDS):
    """Poll url in a daemon thread until it answers 200, then call hear once; whatever else comes never matters.

    Args:
        url: `aws` for its instance metadata, or any URL that answers 200 once the machine is to go and something else,
            or nothing, before.
        hear: Called with a sentence's subject, in the thread.

    Source: docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """
    url, ended = AWS if url == "aws" else url, threading.Event()

    def poll():
        while not ended.wait(poll_seconds):
            if noticed(url):
                hear("the cloud's notice that it takes this machine back")
                return

    threading.Thread(target=poll, daemon=True, name="spot notice").start()
    return ended


def noticed(url):
    """Whether url answers 200. False for every other answer and for none."""
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # metadata is this machine's own
    token = _answer(straight, urljoin(url, "/latest/api/token"), "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token} if token else {}  # IMDSv2, where the machine has it
    return _answer(straight, url, "GET", headers) is not None


def _answer(opener, url, method, headers):
    """The body of a 200, or None."""
    try:
        with opener.open(urllib.request.Request(url, method=method, headers=headers), timeout=ANSWER_SECONDS) as answer:
            return answer.read(10_000).decode("latin-1").strip() if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
