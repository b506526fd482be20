"""The way to a rollout worker and back: nothing is lost, doubled or given to somebody else, and calls are shared."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rlsys.actors.mailbox import GATHER_S, Mailbox, Tray
from rlsys.errors import EngineLost
from rlsys.rollout.play import Member, PlaySpec
from rlsys.sim.clock import VirtualClock
from tests.builders import make_prompt

SPEC = PlaySpec(group_size=1, temperature=1.0, max_tokens=8, seed=0)
CALL_S = 0.01  # one way


class Call:
    """A remote method: takes its time to go over and back."""

    def __init__(self, clock: VirtualClock, method: Callable[..., Awaitable[Any]]) -> None:
        self._clock, self._method = clock, method
        self.sizes: list[list[int]] = []

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        self.sizes.append([len(argument) for argument in arguments])
        return self._go(*arguments)

    async def _go(self, *arguments: Any) -> Any:
        await self._clock.sleep(CALL_S)
        result = await self._method(*arguments)
        await self._clock.sleep(CALL_S)
        return result


class Worker:
    """Plays the member of a name in as many seconds as the name says; "lost" is lost."""

    def __init__(self, clock: VirtualClock, slots: int = 100) -> None:
        self._clock = clock
        self.stopped: list[str] = []
        self._tray = Tray(self, clock, slots)  # type: ignore[arg-type]
        self.begin, self.ended = Call(clock, self._begin), Call(clock, self._tray.ended)

    async def _begin(self, orders: Any, cancelled: Any) -> None:
        self._tray.begin(orders, cancelled)

    async def play_rollout(self, prompt: Any, member: Member, spec: PlaySpec) -> Any:
        if member.name == "lost":
            raise EngineLost("e0 is lost")
        try:
            await self._clock.sleep(float(member.name))
        except asyncio.CancelledError:
            self.stopped.append(member.name)
            raise
        return (prompt, member)


def test_everybody_gets_his_own_rollout_whatever_order_they_end_in() -> None:
    clock = VirtualClock()

    async def main() -> None:
        mailbox = Mailbox(Worker(clock), "e0")

        async def ask(index: int) -> None:
            for turn in range(20):
                prompt, member = make_prompt(index), Member(name=str((index * 7 + turn * 5) % 11 * 0.004))
                ended: Any = await mailbox.play(prompt, member, SPEC)
                assert ended == (prompt, member)
                await clock.sleep(0.003 * (index % 3))

        await asyncio.gather(*map(ask, range(50)))

    clock.run(main())


def test_what_is_asked_for_in_one_moment_goes_over_in_one_call() -> None:
    clock = VirtualClock()

    async def main() -> tuple[list[list[int]], float]:
        worker = Worker(clock)
        mailbox = Mailbox(worker, "e0")
        members = [Member(name=seconds) for seconds in ("0.5", "0.5", "0.5", "3.0")]
        began = clock.now()
        first = [asyncio.create_task(mailbox.play(make_prompt(), member, SPEC)) for member in members]
        await asyncio.gather(*first[:3])
        short_s = clock.now() - began
        await first[3]
        return worker.begin.sizes, short_s

    sizes, short_s = clock.run(main())
    assert sizes == [[4, 0]]
    assert short_s == pytest.approx(0.5 + GATHER_S + 2 * CALL_S)  # they do not wait for the long one


def test_what_ends_in_one_moment_comes_back_in_one_call() -> None:
    clock = VirtualClock()
    ends_s = [1.0, 1.0 + GATHER_S / 2, 2.0, 2.0 + 2 * GATHER_S]

    async def main() -> tuple[int, list[float]]:
        worker = Worker(clock)
        mailbox = Mailbox(worker, "e0")

        async def ended_s(seconds: float) -> float:
            await mailbox.play(make_prompt(), Member(name=str(seconds)), SPEC)
            return clock.now()

        times = await asyncio.gather(*map(ended_s, ends_s))
        return len(worker.ended.sizes), times

    calls, times = clock.run(main())
    assert calls == 3
    gathered_s = 1.0 + GATHER_S
    wanted = [gathered_s, gathered_s, 2.0 + GATHER_S, ends_s[-1]]  # for the last one of all nothing is waited
    assert times == pytest.approx([seconds + 2 * CALL_S for seconds in wanted])


@pytest.mark.parametrize(
    ("slots", "returned_s"),
    [
        (1, [1.11, 1.11, 1.11, 2.01]),  # full with the last one alone: for as long as may be
        (2, [1.09, 1.09, 1.09, 2.01]),  # until there is room
        (4, [1.03, 1.075, 1.115, 2.01]),  # there is room at once
    ],
)
def test_while_the_engine_is_full_what_has_ended_waits_for_more(slots: int, returned_s: list[float]) -> None:
    clock = VirtualClock()

    async def main() -> list[float]:
        mailbox = Mailbox(Worker(clock, slots), "e0")

        async def ended_s(seconds: float) -> float:
            await mailbox.play(make_prompt(), Member(name=str(seconds)), SPEC)
            return clock.now()

        return await asyncio.gather(*map(ended_s, [0.99, 1.035, 1.065, 1.99]))

    assert clock.run(main()) == pytest.approx(returned_s)


def test_what_is_cancelled_is_stopped_over_there_and_the_others_go_on() -> None:
    clock = VirtualClock()

    async def main() -> tuple[list[str], Any]:
        worker = Worker(clock)
        mailbox = Mailbox(worker, "e0")
        playing = [
            asyncio.create_task(mailbox.play(make_prompt(), Member(name=seconds), SPEC)) for seconds in ("8.0", "9.0")
        ]
        await clock.sleep(1.0)
        playing[0].cancel()
        await clock.sleep(2 * CALL_S)
        return list(worker.stopped), (await playing[1])[1].name  # type: ignore[index]

    assert clock.run(main()) == (["8.0"], "9.0")


def test_a_lost_engine_ends_everything_that_is_under_way() -> None:
    clock = VirtualClock()

    async def main() -> list[Any]:
        mailbox = Mailbox(Worker(clock), "e0")
        members = [Member(name="9.0"), Member(name="lost"), Member(name="9.0")]
        playing = (mailbox.play(make_prompt(), member, SPEC) for member in members)
        return await asyncio.gather(*playing, return_exceptions=True)

    assert [type(ended) for ended in clock.run(main())] == [EngineLost] * 3


def test_a_mailbox_is_empty_once_everybody_has_his_rollout() -> None:
    clock = VirtualClock()

    async def main() -> None:
        mailbox = Mailbox(Worker(clock), "e0")
        await mailbox.emptied()
        playing = [
            asyncio.create_task(mailbox.play(make_prompt(), Member(name=seconds), SPEC)) for seconds in ("1.0", "2.0")
        ]
        await clock.sleep(0.5)
        await mailbox.emptied()
        assert all(task.done() for task in playing) and clock.now() == pytest.approx(2.0 + 2 * CALL_S)

    clock.run(main())


def test_a_closed_mailbox_leaves_nobody_waiting() -> None:
    clock = VirtualClock()

    async def main() -> None:
        mailbox = Mailbox(Worker(clock), "e0")
        waiting = asyncio.create_task(mailbox.play(make_prompt(), Member(name="100.0"), SPEC))
        await clock.sleep(1.0)
        mailbox.close()
        with pytest.raises(EngineLost, match="out of service"):
            await waiting

    clock.run(main())
