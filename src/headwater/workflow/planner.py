"""From a recipe to the graph of its distinct stages.

Pure and free of torch. Two arms whose chains begin alike (same settings, parents, data and
seed) meet in the same node, because a node is named by what decides its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from headwater.config.arms import Arm
from headwater.config.recipe import ChainItem, ModelSpec, Recipe
from headwater.config.stages import READS_TEACHER
from headwater.errors import InputError
from headwater.models.source_names import SourceKind, describe_source
from headwater.models.tiny_sizes import tiny_size
from headwater.near_names import near
from headwater.workflow.data_identity import GraphData
from headwater.workflow.digests import digest
from headwater.workflow.graph import (
    GRADES,
    NEEDS_VAULT,
    STAGE_VERSIONS,
    ArmPlan,
    BasePlan,
    Graph,
    Role,
    StageNode,
)
from headwater.workflow.node_settings import options_of, settled
from headwater.workflow.reader_rollouts import hashed_settings, rollouts_stage
from headwater.workflow.source_teachers import Teachers


def build_graph(
    recipe: Recipe,
    data: GraphData,
    *,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> Graph:
    """The graph of a recipe for these seeds and arms (all of the recipe's by default).

    Raises InputError for an arm that does not exist, seeds that are none, a teacher nobody
    reads, and teachers of sources that a pool does not have.
    """
    chosen = list(dict.fromkeys(arms if arms is not None else recipe.arms))
    unknown = [name for name in chosen if name not in recipe.arms]
    if unknown or not chosen:
        raise InputError(
            f"--arms {','.join(unknown) or '(none)'}: not an arm of this recipe; choose from "
            f"{', '.join(recipe.arms)}{near(unknown[0], recipe.arms) if unknown else ''}"
        )
    seeds = recipe.seeds if seeds is None else tuple(seeds)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(
            f"--seeds {','.join(map(str, seeds)) or '(none)'}: expected different whole numbers "
            "from 0 up, such as 0,1,2"
        )
    builder = GraphBuilder(recipe, data)
    plans: list[ArmPlan] = []
    bases: dict[tuple[str, int], BasePlan] = {}
    for seed in seeds:
        for name in chosen:
            plans.append(builder.arm(name, seed))
            for role, (model, _) in recipe.arms[name].models.items():
                if role != "student" and (model, seed) not in bases:
                    bases[model, seed] = builder.base_plan(model, seed)
    return Graph(builder.nodes, tuple(plans), tuple(bases.values()))


class GraphBuilder:
    """Collects nodes; asking twice for the same stage gives the same node."""

    def __init__(self, recipe: Recipe, data: GraphData) -> None:
        self.recipe = recipe
        self.data = data
        self.nodes: dict[str, StageNode] = {}
        self._bases: dict[tuple[str, int], str] = {}

    def arm(self, name: str, seed: int) -> ArmPlan:
        """Nodes of one arm at one seed."""
        arm = self.recipe.arms[name]
        student_reads = any(map(self.recipe.learns_from_arm, arm.student or ()))
        if arm.student is not None and arm.teacher and not student_reads:
            raise InputError(
                f"arms.{name}: trains a teacher that no stage of the student reads; add warmup, "
                "opd or sample_sft to `student`, or remove `teacher`"
            )
        student = None
        probes: dict[str, str] = {}
        teacher = None if arm.teacher is None else self.teachers(arm, f"arms.{name}", seed)
        if arm.student is not None:
            start = self.base(arm.student_model, seed)
            student = self.chain(arm.student, start, "student", seed, teacher)
            if teacher is not None and student_reads:
                probes = self.probes(arm.student, start, seed, teacher)
        end = None if teacher is None else teacher.default
        return ArmPlan(
            arm=name,
            seed=seed,
            evaluates=arm.evaluates,
            teacher=end,
            student=student,
            teacher_evaluations=self.evaluations(end, "teacher", seed),
            student_evaluations=self.evaluations(student, "student", seed),
            probes=probes,
            teachers={} if teacher is None else teacher.others,
        )

    def teachers(self, arm: Arm, where: str, seed: int) -> Teachers:
        """The teachers of an arm; `where` the recipe has it."""
        ends = {
            role: self.chain(chain, self.base(model, seed), "teacher", seed)
            for role, (model, chain) in arm.models.items()
            if role != "student"
        }
        others = {source: ends[f"teachers.{source}"] for source in arm.teachers}
        return Teachers(where, ends["teacher"], others)

    def probes(
        self, items: Sequence[ChainItem], start: str, seed: int, teacher: Teachers
    ) -> dict[str, str]:
        """Distances to the teacher before the first transfer stage and after each of them.

        All on prompts of the first one's pool. "start" and kinds (numbered where they repeat)
        -> fingerprints; {} where the recipe wants none.
        """
        if self.recipe.diagnostics.prompts == 0:
            return {}
        pool = next(self.recipe.pool(item) for item in items if item.kind in READS_TEACHER)
        found: dict[str, str] = {}
        current = start
        for item in items:
            if item.kind in READS_TEACHER and not found:
                found["start"] = self._probe(current, teacher, pool, seed)
            current = self._stage(item, current, "student", seed, teacher)
            if item.kind in READS_TEACHER:
                repeats = sum(name.partition(":")[0] == item.kind for name in found)
                name = f"{item.kind}:{repeats + 1}" if repeats else item.kind
                found[name] = self._probe(current, teacher, pool, seed)
        return found

    def _probe(self, model: str, teacher: Teachers, pool: str | None, seed: int) -> str:
        config = self.recipe.diagnostics.model_dump(mode="json")
        config["sampling"] = sampling = self._sampling(config)
        return self._add(
            kind="probe",
            config=config,
            seed=seed,
            stream=f"probe:{pool}",
            role="student",
            model_name=self.nodes[model].model_name,
            pool=pool,
            model=model,
            teacher=teacher.default,
            sources=teacher.dealt(self._sources(pool))[teacher.default],
            sampling=sampling,
        )

    def base_plan(self, model_name: str, seed: int) -> BasePlan:
        """A base model and its evaluations."""
        model = self.base(model_name, seed)
        return BasePlan(model_name, seed, model, self.evaluations(model, "base", seed))

    def base(self, model_name: str, seed: int) -> str:
        """Fingerprint of a model as every arm begins with it: source, then its preparation.

        A model with a seed of its own is one base for every seed of the study.
        """
        own = self.recipe.models[model_name].seed
        seed = seed if own is None else own
        if (model_name, seed) not in self._bases:
            source = self._source(model_name, seed)
            prepare = self.recipe.models[model_name].prepare
            self._bases[model_name, seed] = self.chain(prepare, source, "base", seed)
        return self._bases[model_name, seed]

    def _source(self, model_name: str, seed: int) -> str:
        spec = self.recipe.models[model_name]
        source = describe_source(spec.source)
        parent = self.base(source.parent, seed) if source.parent else None
        own = ModelSpec(source=spec.source, layers=spec.layers)
        config = own.model_dump(mode="json", exclude={"lora", "seed"})
        # Only weights drawn at random depend on the seed; a downloaded model is one model.
        tiny = source.kind is SourceKind.TINY
        own_seed = seed if tiny else 0
        options: dict[str, Any] = {"size": asdict(tiny_size(source.target))} if tiny else {}
        if spec.source in self.data.source_files:
            options["files"] = self.data.source_files[spec.source]
        return self._add(
            kind="source",
            config=config,
            seed=own_seed,
            stream=f"source:{spec.source}",
            role="base",
            model_name=model_name,
            model=parent,
            options=options,
        )

    def chain(
        self,
        items: Sequence[ChainItem],
        start: str,
        role: Role,
        seed: int,
        teacher: Teachers | None = None,
    ) -> str:
        """Append stages to `start`; returns the fingerprint of the last one."""
        current = start
        for item in items:
            current = self._stage(item, current, role, seed, teacher)
        return current

    def _stage(
        self, item: ChainItem, model: str, role: Role, seed: int, teacher: Teachers | None
    ) -> str:
        settings = self.recipe.stage(item)
        pool = self.recipe.pool(item)
        start = self.nodes[model]
        spec = self.recipe.models[start.model_name]
        config, base = settled(settings.model_dump(mode="json"), spec, start, role)
        sampling = self._sampling(config)
        rollouts = None
        asked: str | None = None
        others: Mapping[str, str] = {}
        if item.kind in ("opd", "mixed"):
            assert teacher is not None, "the recipe's validators require a teacher chain"
            asked, others = teacher.default, teacher.by_source(self._sources(pool))
        if item.kind in ("warmup", "sample_sft"):
            rollouts, others = self._rollouts(config, pool, model, teacher, seed)
            config["sampling"] = None  # it was the rollouts'; this stage samples nothing
            del config["rollouts"]
        elif "sampling" in config:
            config["sampling"] = sampling
        return self._add(
            kind=item.kind,
            config=config,
            seed=seed,
            stream=self._stream(item.kind, pool, model),
            role=role,
            model_name=start.model_name,
            pool=pool,
            model=model,
            teacher=asked,
            teachers=others,
            rollouts=rollouts,
            base=base,
            sampling=sampling,
            options=options_of(item.kind, self.nodes[base] if base else None, self.recipe.task),
        )

    def _rollouts(
        self,
        reader: Mapping[str, Any],
        pool: str | None,
        model: str,
        teacher: Teachers | None,
        seed: int,
    ) -> tuple[str, dict[str, str]]:
        """The cached rollouts a warmup or sample_sft reads, and those of other teachers by source.

        Equal ones are one node.
        """
        sampling = self._sampling(reader)
        found = rollouts_stage(reader, sampling)
        common: dict[str, Any] = {
            "config": found.config,
            "seed": seed,
            "stream": f"teacher_rollouts:{pool}",
            "role": "teacher",
            "pool": pool,
            "sampling": sampling,
        }
        if found.outside is not None:
            outside = self._add(
                kind="outside_rollouts",
                model_name=found.outside,
                model=Graph(self.nodes, ()).root(model),  # whose tokenizer they are written in
                options={"files": self.data.source_files.get(found.outside)},
                **common,
            )
            return outside, {}
        assert teacher is not None, "the recipe's validators require a teacher chain"
        drawn = {
            end: self._add(
                kind="teacher_rollouts",
                model_name=self.nodes[end].model_name,
                teacher=end,
                sources=sources,
                **common,
            )
            for end, sources in teacher.dealt(self._sources(pool)).items()
        }
        others = teacher.by_source(self._sources(pool))
        return drawn[teacher.default], {source: drawn[end] for source, end in others.items()}

    def _sources(self, pool: str | None) -> Mapping[str, str]:
        return {} if pool is None else self.data.pools[pool].sources

    def evaluations(self, model: str | None, role: Role, seed: int) -> dict[str, str]:
        """Evaluation set -> fingerprint of this model's evaluation on it."""
        if model is None:
            return {}
        config = self.recipe.evaluation.model_dump(mode="json")
        config["sampling"] = sampling = self._sampling(config)
        return {
            name: self._add(
                kind="evaluate",
                config=config,
                seed=seed,
                stream=f"evaluate:{name}",
                role=role,
                model_name=self.nodes[model].model_name,
                eval_set=name,
                model=model,
                sampling=sampling,
            )
            for name in self.recipe.task.eval
        }

    def _sampling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The stage's own sampling settings, or the recipe's; {} for a stage that has none."""
        if "sampling" not in config:
            return {}
        own = config["sampling"]
        return dict(own) if own else self.recipe.sampling.model_dump(mode="json")

    def _stream(self, kind: str, pool: str | None, model: str) -> str:
        """Kind and pool, numbered where a chain repeats them: no two stages draw alike."""
        repeats = 1
        ancestor: str | None = model
        while ancestor is not None:
            node = self.nodes[ancestor]
            repeats += (node.kind, node.pool) == (kind, pool)
            ancestor = node.model
        name = f"{kind}:{pool}" if pool else kind
        return name if repeats == 1 else f"{name}:{repeats}"

    def _add(self, **fields: Any) -> str:
        fingerprint = self._fingerprint(fields)
        if fingerprint not in self.nodes:
            self.nodes[fingerprint] = StageNode(fingerprint=fingerprint, **fields)
        return fingerprint

    def _fingerprint(self, fields: Mapping[str, Any]) -> str:
        kind = fields["kind"]
        task, compute = self.recipe.task, self.recipe.compute
        data = None
        if fields.get("pool"):
            data = self.data.pools[fields["pool"]]
        elif fields.get("eval_set"):
            data = self.data.evals[fields["eval_set"]]
        config = hashed_settings(fields["config"])
        if kind == "evaluate":
            config.pop("problems")  # the set's identity already says which ones
        trains = kind != "source"
        payload = {
            "kind": kind,
            "version": STAGE_VERSIONS[kind],
            "config": config,
            "parents": [fields.get("model"), fields.get("teacher"), fields.get("rollouts")],
            "problems": data.problems if data else None,
            "labels": data.labels if data and kind in NEEDS_VAULT else None,
            "prompt": task.prompt if trains else None,
            "verifier": self._verifier() if kind in GRADES else None,
            "seed": fields["seed"],
            "stream": fields["stream"],
            "sampling": fields.get("sampling", {}),
            "options": fields.get("options", {}),
            "compute": compute.identity(kind) if trains else None,
        }
        if data and (by_source := fields.get("teachers")):
            payload["teachers"] = [[s, by_source[s], data.sources[s]] for s in sorted(by_source)]
        if data and (read := fields.get("sources")):
            payload["sources"] = [[source, data.sources[source]] for source in read]
        return digest(payload)[:16]

    def _verifier(self) -> list[Any]:
        task, code = self.recipe.task, self.data.verifier_code
        threshold = [] if task.verifier_correct_from == 1 else [task.verifier_correct_from]
        return [task.verifier, task.verifier_timeout_seconds, *([code] if code else []), *threshold]
