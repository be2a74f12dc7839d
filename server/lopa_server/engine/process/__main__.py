"""python -m lopa_server.engine.process FD: see `host`."""

import signal
import socket
import sys

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from lopa_server.engine.process import host  # takes seconds, in which signals may come

    host.run(socket.socket(fileno=int(sys.argv[1])))
