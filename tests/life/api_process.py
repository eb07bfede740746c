"""An API process for a test to kill: supervises a hash engine, prints its pid, and keeps it busy.

`python -m tests.life.api_process SETTINGS PROMPT_ID`; PROMPT_ID -1 keeps the engine idle.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from engine.messages import EngineOptions
from server.engine_client import EngineClient
from server.supervisor import Supervisor
from tests.life.hash_worker import ask
from tests.life.serving import HASH_COMMAND, until


async def main(settings: str, prompt_id: int) -> None:
    client = EngineClient()
    supervisor = Supervisor(client, EngineOptions(model_dir=settings), command=HASH_COMMAND)
    supervisor.start()
    await until(lambda: client.progress is not None or client.state != "starting")
    if "load" not in settings:
        await client.settled()
    if prompt_id >= 0:
        client.open([ask([prompt_id], 4000)])
        await asyncio.sleep(0.2)
    print(supervisor.pid, client.state, flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background inherits it as ignored
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
