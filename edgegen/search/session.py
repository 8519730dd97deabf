"""A search from its order to its front: opened or joined, worked on, and written down."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from edgegen import files, judgement, run, serial
from edgegen.errors import BudgetError, UsageError
from edgegen.report import text
from edgegen.request import Request, check_out
from edgegen.search import database, measured, spaces, store, strategies, supernet, working, writing
from edgegen.search.measured import Bench
from edgegen.search.order import Opened, Order
from edgegen.search.spaces import Space
from edgegen.search.store import Figures

STUDY = "EDGEGEN_STUDY"  # the address may hold a password, which a command line would show to everybody


def search(order: Order, progress: judgement.Progress = run.quiet) -> Path:
    """Search, and write the front into `order.out`; the path of front.json. The same order again goes on.

    Raises:
        UsageError: bad input. BudgetError: a limit that no candidate can meet; names the nearest.
    """
    space = spaces.load(order.space)
    strategies.make(order.sampler, space, order.trials, 0)
    url, name = order.study or str((order.out / "study.db").absolute()), order.name or _name(order)
    if order.study:
        database.open_storage(url).engine.dispose()  # before the minutes that the network takes
    elif not (order.out / "study.db").is_file():
        check_out(order.out, resume=False)
    request = dataclasses.replace(order.request, recipe="", kept=(), resume=False, command="")
    bench = measured.open_bench(_own(request), progress)
    try:
        opened = _opened(order, space, bench, url, name)
        try:
            return _searched(order, opened, url, name, progress)
        finally:
            opened.store.close()
    finally:
        shutil.rmtree(bench.run.folder, ignore_errors=True)


def join(url: str, name: str = "", progress: judgement.Progress = run.quiet, grace: float = 60.0) -> int:
    """Work on a study that is there until it is done; how many candidates this worker did.

    Raises:
        UsageError: no such study, or the network or data here are not those of the study.
    """
    name = name or _only(url)
    kept, study, content = store.open_study(url, name, None, None)
    trials = int(study.user_attrs.get("trials", 0))
    ended = kept.count() >= trials > 0 and not kept.count(store.RUNNING)
    kept.close()
    if ended:  # before the minutes that the network takes
        return 0
    request = serial.from_json(Request, content["request"])
    bench = measured.open_bench(_own(request), progress)
    try:
        if (mine := _fingerprint(bench)) != content["fingerprint"]:
            raise UsageError(
                f"--study {database.shown(url)}: study {name!r} is of another network or other data than"
                f" {request.model} here ({mine} instead of {content['fingerprint']}); copy its weights and data to the"
                " same paths"
            )
        space = spaces.parse(content["space"], f"the space of study {name!r}")
        sampler = strategies.make(content["sampler"], space, trials, request.seed + os.getpid())
        kept, study, _ = store.open_study(url, name, None, sampler, grace)
        opened = Opened(kept, study, bench, space, request.budget, trials, request.seed, {})
        try:
            return _work(opened, progress)
        finally:
            kept.close()
    finally:
        shutil.rmtree(bench.run.folder, ignore_errors=True)


def _name(order: Order) -> str:
    parts = (order.request.model.split(":")[-1], order.request.target, order.space)
    return "-".join(Path(part).stem for part in parts)


def _only(url: str) -> str:
    found = store.names(url)
    if len(found) != 1:
        there = f"there are: {', '.join(found)}; choose by --name" if found else "start one without --join"
        raise UsageError(f"--study {database.shown(url)}: --join needs one study, got {len(found)}; {there}")
    return found[0]


def _own(request: Request) -> Request:
    """The request with a run folder of this process alone; nothing is written to its `out`."""
    place = files.cache_folder() / "search" / f"{os.uname().nodename}-{os.getpid()}"
    return dataclasses.replace(request, out=place, recipe="post-training")


def _fingerprint(bench: Bench) -> str:
    parts = [getattr(bench.run.data, name) for name in ("train", "select")]
    digests = [part.digest for part in parts if part is not None]
    return files.key(run.model_key(bench.run.model), digests, serial.to_json(bench.run.target))


def _opened(order: Order, space: Space, bench: Bench, url: str, name: str) -> Opened:
    """The study with its content; the ends of the space are measured before anything is searched."""
    fitted, left = spaces.fitted(space, bench.layers)
    request = serial.to_json(dataclasses.replace(order.request, out=None, resume=False, command="", recipe="", kept=()))
    content = {
        "request": request, "space": fitted.model_dump(mode="json", by_alias=True), "sampler": order.sampler,
        "fingerprint": _fingerprint(bench),
    }  # fmt: skip
    if not order.study:
        order.out.mkdir(parents=True, exist_ok=True)
    sampler = strategies.make(order.sampler, fitted, order.trials, order.request.seed)
    kept, study, _ = store.open_study(url, name, content, sampler, order.grace)
    study.set_user_attr("trials", order.trials)
    opened = Opened(kept, study, bench, fitted, order.request.budget, order.trials, order.request.seed, left)
    try:
        _ends(opened)
    except BaseException:
        kept.close()
        raise
    return opened


def _ends(opened: Opened) -> None:
    """Measure the extreme candidates once, refuse limits that none meets, and search from them."""
    told = opened.study.user_attrs.get("ends")
    choices = spaces.extremes(opened.space)
    if told is None:
        found = []
        for number, one in enumerate(choices):
            made = spaces.to_recipe(opened.space, one, opened.bench.layers)
            opened.bench.run.progress("ends of the space", f"{number + 1} of {len(choices)}", number / len(choices))
            found.append(serial.to_json(measured.reach(opened.bench, made)))
        opened.study.set_user_attr("ends", found)
        both = [way for one in supernet.ways(opened.space) for way in (one.slice, one.direct)]
        for one in [*choices[:2], *both]:
            opened.study.enqueue_trial(dict(one))
        told = found
    figures = [serial.from_json(Figures, one) for one in told]
    names = [" + ".join(step.name for step in spaces.to_recipe(opened.space, one, opened.bench.layers).steps)
             for one in choices]  # fmt: skip
    if all(one.failure for one in figures):
        raise UsageError(f"no end of the space can be built: {figures[-1].failure}")
    if why := measured.unreachable(opened.budget, list(zip(names, figures, strict=True))):
        raise BudgetError(why)


def _work(opened: Opened, progress: judgement.Progress) -> int:
    kept, began, before = opened.store, time.monotonic(), opened.store.count()

    def done() -> list[Figures]:
        return [row.figures for row in kept.rows() if row.figures is not None]

    def told(row: store.Row) -> None:
        figures = row.figures or Figures()
        said = figures.failure or figures.stopped or f"{figures.latency_ms:.3g} ms, drop {figures.drop}"
        count = kept.count()  # of all workers
        left = (time.monotonic() - began) / max(1, count - before) * max(0, opened.trials - count)
        progress("search", f"candidate {row.slot}: {said}; {text.seconds(left)} left", min(1.0, count / opened.trials))

    objective = measured.objective(opened.bench, opened.space, opened.budget, done)
    return working.work(
        kept, opened.study, opened.space, opened.bench.layers, objective, trials=opened.trials, budget=opened.budget,
        seed=opened.seed, told=told,
    )  # fmt: skip


def _searched(order: Order, opened: Opened, url: str, name: str, progress: judgement.Progress) -> Path:
    for way in supernet.ways(opened.space)[:1]:  # once, before other workers of this machine would do the same
        measured.train_shared(opened.bench, spaces.to_recipe(opened.space, way.slice, opened.bench.layers))
    helpers = [] if order.ray else [_helper(url, name, order.grace) for _ in range(order.workers - 1)]
    try:
        if order.ray:
            from edgegen.search import cluster

            cluster.work(order.ray, max(1, order.workers), url, name, order.grace)
        _work(opened, progress)
        for helper in helpers:
            helper.wait()
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
                helper.wait()
    lost = [helper.returncode for helper in helpers if helper.returncode]
    notes = [f"gene {gene} was left out: {why}" for gene, why in opened.left.items()]
    notes += supernet.compared(opened.space, opened.bench.layers, opened.store.rows())
    if lost:
        notes.append(f"{len(lost)} of {len(helpers)} helping workers ended early; their candidates were done again")
    return writing.write(order, opened, notes, progress)


def _helper(url: str, name: str, grace: float) -> subprocess.Popen[bytes]:
    """A second worker on this machine, as a process of its own."""
    command = [sys.executable, "-m", "edgegen.cli", "search", "--join", "--name", name, "--quiet"]
    command += ["--grace", str(grace)]
    return subprocess.Popen(command, env={**os.environ, STUDY: url}, stdout=subprocess.DEVNULL)
