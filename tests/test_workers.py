"""What is told of a worker that was lost."""

import pytest
import tensorflow as tf

from mptrain import workers

_COLLECTIVE = """Graph execution error:

Detected at node CollectiveReduceV2 defined at (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main

Collective ops is aborted by: Connection reset by peer
The error could be from a previous operation. Restart your program to reset.
\t [[{{node CollectiveReduceV2}}]] [Op:__inference_loop_4711]"""

_SERVER = """Socket closed
Additional GRPC error information from remote target /job:worker/replica:0/task:0 while calling WaitForAllTasks:
:UNKNOWN:Error received from peer  {grpc_message:"Socket closed", grpc_status:14}"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (_COLLECTIVE, "Collective ops is aborted by: Connection reset by peer"),
        (_SERVER, "Socket closed"),
        (
            "{{function_node __wrapped__CollectiveReduceV2_device_/job:worker/task:0}} Collective ops is aborted by: gone",
            "Collective ops is aborted by: gone",
        ),
        (
            "{{function_node __inference_total_42}} Peer worker 1 has restarted. [Op:__inference_total_42]",
            "Peer worker 1 has restarted.",
        ),
        (
            'Detected at node x:\n  File "<frozen runpy>", line 1\n\nStep was cancelled\n\t [[{{node x}}]]\n',
            "Step was cancelled",
        ),
        ("", "UnavailableError"),
    ],
)
def test_reason_is_the_line_that_says_what_happened(message, told):
    error = tf.errors.UnavailableError(None, None, message)
    assert workers.reason(error) == told
