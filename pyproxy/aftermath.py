"""Removes what others left on the node, in a process of its own."""

import asyncio
import sys

from pyproxy.config import Config

CLEANUP_SECONDS = 60.0


async def cleaned_up_after_others(config: Config) -> str | None:
    """Remove what kube-proxy or another mode left, once ours works; return what went wrong.

    Beside another proxy, only what another of our modes left.
    A process of its own, so that this one never imports a mode that it does not run.
    """
    words = [sys.executable, "-m", "pyproxy", "cleanup", f"--keep={config.mode}"]
    if config.ipvs.exclude_cidrs:
        words.append(f"--ipvs-exclude-cidrs={','.join(config.ipvs.exclude_cidrs)}")
    if config.service_proxy_name:
        words.append(f"--service-proxy-name={config.service_proxy_name}")
    try:
        async with asyncio.timeout(CLEANUP_SECONDS):
            process = await asyncio.create_subprocess_exec(
                *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            output, _ = await process.communicate()
    except TimeoutError:
        return f"no end after {CLEANUP_SECONDS:.0f} s"
    except OSError as error:
        return str(error)
    lines = output.decode(errors="replace").splitlines()[-3:]
    return "; ".join(lines) if process.returncode else None
