"""The verb that looks at the machine: doctor."""

from __future__ import annotations

from unclip.errors import ConfigError


def doctor() -> None:
    """Look at versions, devices, caches and the hub, and say what to do about what is missing.

    Ends with an exit code other than 0 only if something will not work.
    """
    from unclip.doctor import examine

    broken = 0
    for state, sentence in examine():
        print(f"{state + ':':<8}{sentence}", flush=True)
        broken += state == "broken"
    if broken:
        raise ConfigError(f"{broken} of these will not work here")
