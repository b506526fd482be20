"""The whole system, in the order of one datum's way. READ THIS FIRST.

      source.next()          rollout_loop: admitted while the lead is below (max_staleness + 1) batches
           |
           v                 one task per group:
      gatherer.play()        every member for itself, put together when the last one has ended (GATHERED):
        roster.acquire() --> PARKED until an engine has a slot and serves a version new enough for when its turn comes
        fleet.play()         RUNNING: vLLM samples; every token is stamped with the version that sampled it
      scorer.score()         SCORING: worker processes with a deadline; a failure is a drop, never a 0
      select()               rewards shaped; a group of which no rollout is selected makes room for another question
      buffer.put()           BUFFERED
           |
           v                 train_loop:
      buffer.take()          LEASED, oldest first; what is too old is dropped and asked again
      make_batch()           advantages on tokens, token-budget microbatches
      learner.step()         DeepSpeed
      sync.publish()         engines pull the new version in their own pull_loop, and prove it
      buffer.commit()        TRAINED
      checkpoints.begin()    every few steps, after the last one, and at a stop: the learner waits for one copy,
      checkpoints.finish()   which is written while it trains on

      eval_loop              held-out questions on the same engines, beside all this
      fleet_loop             engines that come and go; each has a pull_loop and a watch_loop: how loaded it is
      live_loop              the progress view

All loops run at once; only the lead couples production to training. ``max_staleness`` 0 is the same code: the lead is
one batch, and a publication waits for every engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rlsys.buffer.replay import Lease, Take
from rlsys.buffer.staleness import doomed_before
from rlsys.controller.attrition import Attrition
from rlsys.controller.crew import Crew
from rlsys.controller.deadline import within
from rlsys.controller.evaluate import Evaluator
from rlsys.controller.failures import first_failure
from rlsys.controller.gather import Gatherer
from rlsys.controller.lead import Lead
from rlsys.controller.ledger import Ledger, Stage
from rlsys.controller.live import live_loop
from rlsys.controller.parts import Parts, Scorer
from rlsys.controller.plan import Plan
from rlsys.controller.roster import Roster
from rlsys.controller.saving import Saver
from rlsys.controller.state import RunState
from rlsys.controller.stats import age_metrics, batch_metrics, drop_metrics, recomputed_tokens, trained_ages
from rlsys.controller.sync import WeightSync
from rlsys.controller.totals import Totals
from rlsys.errors import WaitTimeout
from rlsys.records import Prompt, RolloutGroup

Answer = TypeVar("Answer")

BUFFER_ANSWER_S = 60.0  # deadline of a buffer call beyond its own wait
TAKE_WAIT_S = 1.0  # one wait for a batch; between two of them pending work is looked after


class Loops:
    """The controller of one run, from ``state`` on.

    Attributes:
        stopping: set it to end the training after the step under way, with a checkpoint.
        is_training: whether there is a training to be ended like this.
    """

    def __init__(self, parts: Parts, plan: Plan, state: RunState) -> None:
        self.parts, self.plan, self.version = parts, plan, state.version
        self.ledger = Ledger(state)
        self.totals = Totals.resumed(state.totals)
        self.roster = Roster(parts.fleet.names(), slots=plan.slots, clock=parts.clock)
        self.crew = Crew(parts, plan, self.roster)
        self.sync = WeightSync(
            learner=parts.learner,
            fleet=parts.fleet,
            roster=self.roster,
            segments=parts.segments,
            clock=parts.clock,
            sink=parts.sink,
            lose=self.crew.lose,
            export_timeout_s=plan.step_timeout_s,
            load_timeout_s=plan.play_timeout_s,
            start_timeout_s=plan.start_timeout_s,
            share=plan.update_share,
        )
        self.gatherer = Gatherer(
            parts.fleet,
            self.roster,
            lose=self.crew.lose,
            sampled=self.totals.sample,
            timeout_s=plan.play_timeout_s,
            max_retries=plan.max_retries,
        )
        self.evaluator = Evaluator(
            parts, plan, self.roster, gatherer=self.gatherer, score=partial(self._score, parts.grader)
        )
        self.saver = Saver(parts, self.ledger, self.totals, state, plan.step_timeout_s)
        self.lead = Lead(plan, self.ledger, state.version.step)
        self._tokens_taken = 0  # of those that have ended, when the last batch was taken
        self._lead_fell = asyncio.Event()
        self.attrition = Attrition(parts, plan, self.ledger, self._lead_fell.set)
        self._eval_due = asyncio.Event()
        self.stopping = asyncio.Event()
        self.is_training = False
        self._background: set[asyncio.Task[None]] = set()
        self._next_metrics: dict[str, float] = {}  # of what happened between two steps
        self._learner_waits = self._told_of_equal_rewards = False

    async def run(self) -> None:
        """Evaluate, train up to ``plan.steps`` batches, evaluate. The first failure of any loop ends all, and is
        raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                await self.saver.restore()
                fleet = tasks.create_task(self.crew.fleet_loop(self.sync.pull_loop))
                await self.sync.publish_everywhere(self.version)
                if "eval_before" not in self.totals.evals:
                    await self._evaluate("eval_before", self.plan.pass_samples)
                if self.version.step < self.plan.steps:
                    await self._train(tasks)
                if not self.stopping.is_set():
                    await self.sync.publish_everywhere(self.version)
                    await self._evaluate("eval_after", self.plan.pass_samples)
                fleet.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        self.totals.open(self.parts.clock.now(), self.roster.seconds())
        self.is_training = True
        watching = live_loop(self.parts, self.ledger, self.roster, self._live_figures)
        for loop in (watching, self.eval_loop(), self.rollout_loop(tasks)):
            self._spawn(tasks, loop)
        await self.train_loop(tasks)
        self.is_training = False
        for task in self._background:
            task.cancel()
        self.totals.close(self.parts.clock.now(), self.roster.seconds())
        self.ledger.check(await self._buffer(self.parts.buffer.counts()), quiet=not self.ledger.num_groups)

    def _spawn(self, tasks: asyncio.TaskGroup, loop: Coroutine[Any, Any, None]) -> None:
        """Run something beside the training, until its end or that of the training."""
        task = tasks.create_task(loop)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def rollout_loop(self, tasks: asyncio.TaskGroup) -> None:
        """Start groups for as long as the run needs them.

        consumes: questions of the source.
        waits for: room below the lead limit.
        unblocked by: a commit, a drop, a finished group.
        produces: one ``group_task`` per question.
        """
        while True:
            min_step = self.lead.room()
            if min_step is not None:
                prompt = self.parts.source.next()
                self.ledger.submit(prompt, [one.rollout_id(prompt.group_id) for one in self.plan.spec.members])
                self._spawn(tasks, self.group_task(prompt, min_step))
            else:
                self._lead_fell.clear()
                await self._lead_fell.wait()

    async def group_task(self, prompt: Prompt, min_step: int) -> None:
        """Carry one question from an engine that serves ``min_step`` or later into the buffer.

        consumes: one question.
        waits for: a slot for each member, their answers, their rewards.
        unblocked by: released slots, a proven weight version; deadlines bound each wait.
        produces: a scored group in the buffer; or drops by cause, and this question or another one asked in its place.
        """
        group = await self.gatherer.play(prompt, self.plan.spec, min_step=min_step, move=self.ledger.move, ages=True)
        group = self.attrition.close(group)
        if group.rollouts:
            self.ledger.move_group(group, Stage.SCORING)
            group = self.attrition.close(await self._score(self.parts.scorer, group))
        if group.rollouts:
            group = self.attrition.select(group)
        if group.rollouts:
            self.ledger.move_group(group, Stage.BUFFERED)
            await self._buffer(self.parts.buffer.put(group))
            self.attrition.arrive()

    async def train_loop(self, tasks: asyncio.TaskGroup) -> None:
        """Train until ``plan.steps`` batches are done, or a stop; the next batch is fetched while one is trained.

        consumes: leases of the buffer.
        waits for: enough finished groups; at ``max_staleness`` 0 for every engine to serve the new version.
        unblocked by: buffer.put; sync.
        produces: weight versions, room below the lead limit, and checkpoints.
        """
        clock, every_steps = self.parts.clock, self.plan.checkpoint_every_steps
        fetching = tasks.create_task(self._next_lease(self.version.step))
        while self.version.step < self.plan.steps:
            began, step = clock.now(), self.version.step
            if (lease := await self._fetched(fetching)) is None:
                break
            waited_s = clock.now() - began
            if step + 1 < self.plan.steps:
                fetching = tasks.create_task(self._next_lease(step + 1))
            training = self.parts.learner.step(self.parts.make_batch(lease.groups, step))
            built_s = clock.now() - began - waited_s
            report = await within(self.plan.step_timeout_s, f"the learner to train step {step}", training)
            self.version = report.version
            trained_s = clock.now() - began - waited_s - built_s
            await self._publish()
            await self._buffer(self.parts.buffer.commit(lease.lease_id, self.version))
            await self._account(
                lease,
                step,
                {
                    **report.metrics,
                    "timing_s/wait_for_batch": waited_s,
                    "timing_s/build": built_s,
                    "timing_s/train": trained_s,
                    "timing_s/publish": clock.now() - began - waited_s - built_s - trained_s,
                    "timing_s/step": clock.now() - began,
                },
            )
            if self.plan.eval_every_steps and self.version.step % self.plan.eval_every_steps == 0:
                self._eval_due.set()
            if self.version.step == self.plan.steps or (every_steps and self.version.step % every_steps == 0):
                await self.saver.save(self.version, self.roster.seconds(), tasks)
        fetching.cancel()
        is_needed = self.stopping.is_set()
        await self.saver.save_last(self.version, self.roster.seconds(), tasks, is_needed=is_needed)

    async def eval_loop(self) -> None:
        """Evaluate beside the training.

        consumes: held-out questions.
        waits for: the next step at which an evaluation is due; one that comes due during another is merged into it.
        unblocked by: train_loop.
        produces: metrics of the next step.
        """
        while True:
            await self._eval_due.wait()
            self._eval_due.clear()
            if self.version.step < self.plan.steps:  # after the last step the final evaluation follows anyway
                await self._evaluate("eval", 0)

    # --- one datum's steps -------------------------------------------------------------------------------------------

    async def _score(self, scorer: Scorer, group: RolloutGroup) -> RolloutGroup:
        return await within(self.plan.score_timeout_s, f"the rewards of {group.group_id}", scorer.score(group))

    async def _next_lease(self, step: int) -> Lease:
        """Wait for the batch to be trained at ``step``; what is too old by then leaves by name and is asked again."""
        plan = self.plan
        self.gatherer.stop_older(doomed_before(step=step, max_staleness=plan.max_staleness, age_policy=plan.age_policy))
        quiet_since, seen = self.parts.clock.now(), self._progress_mark()
        while True:
            take = await self._take(step)
            for group in take.shrunk:
                self.attrition.close(group)
            if take.lease is not None:
                for group in take.lease.groups:
                    self.ledger.move_group(group, Stage.LEASED)
                return take.lease
            # with no engine left the crew has its own deadlines
            if self._progress_mark() != seen or not self._learner_waits or not self.roster.names:
                quiet_since, seen = self.parts.clock.now(), self._progress_mark()
            elif self.parts.clock.now() - quiet_since > self.plan.stall_s:
                raise WaitTimeout(f"rollouts ({self.ledger.describe()}; {self.roster.describe()})", self.plan.stall_s)

    async def _take(self, step: int) -> Take:
        batch = self.plan.batch  # a budget of sampled tokens is to be spent first
        is_spent = batch.by != "sampled_tokens" or self.ledger.finished_tokens >= batch.tokens
        if not (is_spent or await self.gatherer.has_ended(self._tokens_taken + batch.tokens, TAKE_WAIT_S)):
            return Take(lease=None, shrunk=())
        take = await self._buffer(self.parts.buffer.take(step, TAKE_WAIT_S))
        if take.lease is not None:
            self._tokens_taken = self.gatherer.tokens_ended
            self.lead.leased()
        return take

    async def _fetched(self, fetching: asyncio.Task[Lease]) -> Lease | None:
        """None at a stop. The learner stands still here, so that a publication that was put off can be made up for."""
        self._learner_waits = True
        while not fetching.done() and not self.stopping.is_set():
            await asyncio.wait({fetching}, timeout=TAKE_WAIT_S)
            await self.sync.publish_pending()
        self._learner_waits = False
        return None if self.stopping.is_set() else fetching.result()

    async def _publish(self) -> None:
        if self.plan.max_staleness == 0:
            await self.sync.publish_everywhere(self.version)
        else:
            await self.sync.publish(self.version)

    async def _account(self, lease: Lease, step: int, timing: dict[str, float]) -> None:
        """The leased groups are trained: ledger, law 1, metrics."""
        for group in lease.groups:
            self.ledger.train(group)
        self.lead.trained(self.version.step)
        self.parts.sink.commit(self.version, [str(group.prompt.draw) for group in lease.groups])
        self._lead_fell.set()
        self.ledger.check(await self._buffer(self.parts.buffer.counts()))
        self.ledger.check_draws(self.parts.source.counts())
        ages = trained_ages(lease.groups, step, self.plan)
        metrics = {**timing, **batch_metrics(lease.groups, ages), **age_metrics(lease.groups, ages, step, self.plan)}
        metrics |= drop_metrics(self.ledger.dropped)
        metrics |= {"weights/recomputed_tokens": recomputed_tokens(lease.groups)} if self.plan.recomputes else {}
        self.totals.book(lease.groups, ages)
        self.totals.wait_for_batch_s += timing["timing_s/wait_for_batch"]
        self.totals.train_s += timing["timing_s/step"] - timing["timing_s/wait_for_batch"]
        counts, now = self.ledger.counts(), self.parts.clock.now()
        buffered = counts[Stage.BUFFERED] + counts[Stage.LEASED]
        metrics |= self.totals.step_balance(now, self.roster.seconds(), buffered=buffered, **self._cores())
        is_flat = self.plan.min_compared > 1 and metrics["critic/groups_without_variance"] == 1.0
        if is_flat and not self._told_of_equal_rewards:
            self._told_of_equal_rewards = True
            score = metrics["critic/score/mean"]
            self.parts.sink.event(
                f"step {step}: the rewards of every group are equal (mean {score:g}): nothing to learn"
            )
        metrics |= self.sync.drain_metrics() | self.attrition.drain_metrics() | self.saver.drain_metrics()
        metrics |= self._next_metrics
        self._next_metrics = {}
        self.parts.sink.step(self.version.step, self.version, metrics)
        logged = lease.groups[: self.plan.rollouts_logged]
        self.parts.sink.rollouts(step, [replace(group, rollouts=group.rollouts[:1]) for group in logged])

    async def _evaluate(self, name: str, pass_samples: int) -> None:
        greedy, sampled = await self.evaluator.run(name, pass_samples)
        if name == "eval":
            self._next_metrics |= greedy.metrics()
        else:
            self.totals.evals |= {name: greedy.accuracy}
            self.totals.evals |= {f"{name}_pass_at_{k}": share for k, share in (sampled or greedy).pass_at.items()}

    # --- small things ------------------------------------------------------------------------------------------------

    async def _buffer(self, answer: Awaitable[Answer]) -> Answer:
        return await within(BUFFER_ANSWER_S, "the replay buffer", answer)

    def _progress_mark(self) -> tuple[int, ...]:
        """Changes whenever a rollout changes its stage."""
        return (self.ledger.submitted, self.ledger.dropped.total(), *self.ledger.counts().values())

    def _cores(self) -> dict[str, float]:
        return {"engine_cores": self.plan.engine_cores, "trainer_cores": self.plan.trainer_cores}

    def _live_figures(self) -> dict[str, float]:
        return {
            **self.lead.gauges(),
            **self.totals.summary(self.parts.clock.now(), self.roster.seconds()),
            **self.sync.counts(),
        }

    def summary(self) -> dict[str, float]:
        """The flat figures of result.json, at any moment."""
        return {
            "steps": self.version.step,
            **self.totals.summary(self.parts.clock.now(), self.roster.seconds()),
            **self.totals.run_balance(self.parts.clock.now(), self.roster.seconds(), **self._cores()),
            "rollouts_submitted": self.ledger.submitted,
            "rollouts_retried": self.gatherer.num_retried,
            "rollouts_moved": self.gatherer.num_moved,
            **self.sync.counts(),
            **self.crew.counts(),
            **drop_metrics(self.ledger.dropped),
        }
