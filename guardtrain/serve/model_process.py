"""`python -m guardtrain.serve.model_process FD`: a guard in a process of its own, which speaks JSON over a socket it inherited.

First it is told what to load, and tells what it has loaded, or why it could not. It ends when the other end of the socket does.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

from guardtrain.allocator import keep_freed_memory
from guardtrain.errors import GuardtrainError
from guardtrain.serve.engine import Inbox, run
from guardtrain.serve.loading import ModelArguments, load_engine
from guardtrain.serve.wire import pack, pack_done, unpack_order


def main() -> None:
    """Load, then score what is asked for until the server closes the socket."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the server ends us when it is done
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    connection = Connection(int(sys.argv[1]))
    gc.disable()  # what is loaded stays: looking through it again and again takes a tenth of the start
    try:
        engine, facts = load_engine(ModelArguments(**json.loads(connection.recv_bytes())))
    except GuardtrainError as error:
        connection.send_bytes(pack({"refused": str(error)}))
        return
    except EOFError:  # the server is gone already
        return
    gc.freeze()
    gc.enable()
    keep_freed_memory()
    inbox: Inbox = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    connection.send_bytes(pack({"loaded": facts.to_json()}))
    run(engine, inbox, lambda finished: connection.send_bytes(pack_done(finished)))


def _listen(connection: Connection, inbox: Inbox) -> None:
    """Pass orders on. A server that is gone, or has been killed, needs no more answers: whatever is under way ends."""
    try:
        while True:
            inbox.put(unpack_order(connection.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main()
