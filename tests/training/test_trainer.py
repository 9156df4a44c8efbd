"""Trainer: one pass for many adapters, against training each by hand."""

import dataclasses
import math

import pytest
import torch
from reference import edited
from training.tiny_tasks import examples, furthest, make_task, run
from transformers import LlamaConfig, LlamaForCausalLM

from redmux.errors import FailedPreconditionError, InvalidArgumentError
from redmux_adapters import Edit, ffn_sites
from redmux_adapters.bases.sites import with_layer_norms
from redmux_adapters.train import (
    Evaluated,
    Example,
    Finished,
    Stepped,
    Task,
    Trainer,
    TrainingBase,
    TrainingOptions,
    default_learning_rate,
)
from redmux_adapters.train.options import rate_factor
from redmux_adapters.train.stream import BatchStream


def by_hand(model, task):
    """Plain transformers, an example at a time, whole logits, tensors of its own."""
    options = task.options
    sites = ffn_sites(model)
    if options.train == "ln":
        sites = with_layer_norms(sites)
    edits = {site: Vectors(dim) for site, dim in sites.items()}
    parameters = [p for edit in edits.values() for p in (edit.scale, edit.bias)]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0)
    stream = BatchStream([e.length for e in task.train], options.batch_size, options.seed)
    losses = []
    for step in range(options.steps):
        batch = [task.train[i] for i in stream.next()]
        with edited(model, edits):
            terms = [
                torch.nn.functional.cross_entropy(
                    model(input_ids=torch.tensor([e.inputs + e.targets])).logits[
                        0, len(e.inputs) - 1 : -1
                    ],
                    torch.tensor(e.targets),
                    reduction="none",
                    label_smoothing=options.label_smoothing,
                )
                for e in batch
            ]
        loss = torch.cat(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_factor(options, step, options.steps)
        optimizer.step()
        losses.append(loss.item())
    return {site: Edit(edit.scale, edit.bias) for site, edit in edits.items()}, losses


class Vectors:
    def __init__(self, dim):
        self.dim = dim
        self.scale = torch.ones(dim, requires_grad=True)
        self.bias = torch.zeros(dim, requires_grad=True)


def test_four_adapters_in_one_pass_are_those_that_are_trained_by_hand(training_base):
    tasks = [
        make_task("plain"),
        make_task("smooth", seed=1, label_smoothing=0.2, batch_size=3, schedule="cosine"),
        make_task("large", seed=2, learning_rate=0.1, clip_norm=0.5, steps=4),
        make_task("normed", seed=3, train="ln", steps=4),
    ]
    trainer = Trainer(training_base, tasks)
    events = run(trainer)
    for task in tasks:
        edits, losses = by_hand(training_base.model, task)
        adapter = trainer.adapter(task.name)
        assert furthest(adapter, dataclasses.replace(adapter, edits=edits)) < 1e-4
        moved = max(float((edit.scale - 1).abs().max()) for edit in edits.values())
        assert moved > 0.02
        if task.name != "smooth":  # which is told without smoothing
            told = [e.loss for e in events if isinstance(e, Stepped) and e.task == task.name]
            assert told == pytest.approx(losses, rel=1e-4)


def test_adapters_trained_together_are_those_trained_alone(training_base):
    tasks = [make_task(f"t{i}", seed=i, valid=4, batch_size=2 + i, steps=5 + i) for i in range(4)]
    together = Trainer(training_base, tasks)
    run(together)
    for task in tasks:
        alone = Trainer(training_base, [task])
        run(alone)
        assert furthest(together.adapter(task.name), alone.adapter(task.name)) < 1e-5


def test_batches_that_do_not_fit_into_a_pass_are_accumulated(training_base):
    tasks = [make_task("a", batch_size=8), make_task("b", seed=1, batch_size=8)]
    at_once, in_parts = Trainer(training_base, tasks), None
    run(at_once)
    in_parts = Trainer(training_base, tasks, max_pass_tokens=24)
    run(in_parts)
    for task in tasks:
        assert furthest(at_once.adapter(task.name), in_parts.adapter(task.name)) < 1e-5


def test_an_adapter_that_diverges_ends_alone(training_base):
    tasks = [make_task("good"), make_task("bad", seed=1), make_task("fine", seed=2)]
    trainer = Trainer(training_base, tasks)
    trainer.step()
    with torch.no_grad():
        trainer.learners[1]._values[0] = math.nan
    events = run(trainer)
    (ended,) = [e for e in events if isinstance(e, Finished) and e.task == "bad"]
    assert (ended.ending, ended.step) == ("diverged", 1)
    assert "nan" in ended.detail
    with pytest.raises(FailedPreconditionError, match="'bad' diverged"):
        trainer.adapter("bad")
    for task in (tasks[0], tasks[2]):
        alone = Trainer(training_base, [task])
        run(alone)
        assert furthest(trainer.adapter(task.name), alone.adapter(task.name)) < 1e-5


def test_the_base_model_is_left_as_it_was(training_base):
    model = training_base.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    logits = model(input_ids=ids).logits
    trainer = Trainer(training_base, [make_task()])
    while trainer.active:
        trainer.step()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, logits)  # no edits outside of passes
    trainer.close()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("part", ["scale", "bias"])
def test_only_the_chosen_part_of_the_chosen_layers_is_trained(training_base, part):
    chosen = make_task("chosen", train=part, layers="0,2", weight_decay=0.1)
    trainer = Trainer(training_base, [chosen, make_task("all", seed=1)])
    run(trainer)
    adapter = trainer.adapter("chosen")
    assert list(adapter.sites) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    for edit in adapter.edits.values():
        assert torch.equal(edit.scale, torch.ones(edit.dim)) == (part == "bias")
        assert torch.equal(edit.bias, torch.zeros(edit.dim)) == (part == "scale")
    assert len(trainer.adapter("all").sites) == 3


def test_weight_decay_leads_to_no_edit(training_base):
    options = {"steps": 10, "schedule": "constant", "warmup": 0.0}
    tasks = [make_task("free", **options), make_task("held", weight_decay=0.9, **options)]
    trainer = Trainer(training_base, tasks)
    run(trainer)
    free, held = (
        sum(float(((e.scale - 1) ** 2).sum()) for e in trainer.adapter(name).edits.values())
        for name in ("free", "held")
    )
    assert held < 0.9 * free


def test_small_steps_are_not_lost_on_a_bf16_base(base):
    config = LlamaConfig.from_pretrained(base.folder)
    model = LlamaForCausalLM.from_pretrained(base.folder, config=config, dtype=torch.bfloat16)
    trainer = Trainer(TrainingBase.of(model, base.tokenizer), [make_task(learning_rate=1e-4)])
    run(trainer)
    edits = trainer.adapter("task").edits.values()
    largest = max(float((edit.scale - 1).abs().max()) for edit in edits)
    assert 1e-4 < largest < 1e-3  # bf16 has nothing between 0.9961, 1 and 1.0078


def test_the_best_vectors_are_kept_and_patience_ends_the_training(training_base):
    # The held-out answers are others than those that are learned, so they only get worse.
    task = dataclasses.replace(
        make_task(steps=200, valid=6, eval_every=1, patience=3, warmup=0.0, learning_rate=0.1),
        train=examples(1, answer=7), valid=examples(2, 6, answer=9),
    )  # fmt: skip
    trainer = Trainer(training_base, [task, make_task("other", steps=12)])
    events = run(trainer)
    seen = [e for e in events if isinstance(e, Evaluated)]
    best = min(seen, key=lambda e: e.loss)
    (ended,) = [e for e in events if isinstance(e, Finished) and e.task == "task"]
    assert (ended.ending, ended.step) == ("stopped early", best.step + 3)
    assert [e for e in events if isinstance(e, Finished)][-1].ending == "completed"
    adapter = trainer.adapter("task")
    with edited(training_base.model, adapter.edits):
        losses = [
            torch.nn.functional.cross_entropy(
                training_base.model(input_ids=torch.tensor([e.inputs + e.targets])).logits[
                    0, len(e.inputs) - 1 : -1
                ],
                torch.tensor(e.targets),
                reduction="none",
            )
            for e in task.valid
        ]
    assert float(torch.cat(losses).mean()) == pytest.approx(best.loss, rel=1e-4)
    assert f"loss {best.loss:.4f}" in adapter.metadata.evaluation


def test_a_restored_trainer_goes_on_bit_by_bit(training_base):
    tasks = [make_task("a", valid=4), make_task("b", seed=1, valid=4, steps=9)]
    whole = Trainer(training_base, tasks)
    for _ in range(4):
        whole.step()
    state = whole.state()
    rest = run(whole)
    again = Trainer(training_base, tasks)
    again.restore(state)
    assert run(again) == rest
    for task in tasks:
        assert again.adapter(task.name).digest == whole.adapter(task.name).digest


def test_a_state_of_other_settings_is_refused_by_name(training_base):
    state = Trainer(training_base, [make_task()]).state()
    other = dataclasses.replace(make_task(learning_rate=0.5), train=examples(9))
    with pytest.raises(FailedPreconditionError, match=r"\(task.learning_rate, task.data differ\)"):
        Trainer(training_base, [other]).restore(state)
    with pytest.raises(FailedPreconditionError, match="tasks differ"):
        Trainer(training_base, [make_task("b")]).restore(state)


def test_the_estimate_changes_nothing_and_counts_all_steps(training_base):
    task = make_task()
    plain, estimated = Trainer(training_base, [task]), Trainer(training_base, [task])
    estimate = estimated.estimate()
    run(plain)
    events = run(estimated)
    assert estimated.adapter("task").digest == plain.adapter("task").digest
    counted = sum(e.num_tokens for e in events if isinstance(e, Stepped))
    assert estimate.num_tokens == pytest.approx(counted, rel=0.2)
    assert estimate.duration_s > 0
    assert estimate.memory_bytes > 1 << 20


def test_a_cancelled_task_keeps_what_it_has_learned(training_base):
    trainer = Trainer(training_base, [make_task("a"), make_task("b", seed=1)])
    trainer.step()
    assert trainer.cancel("a") == Finished("a", 1, "cancelled")
    events = run(trainer)
    assert {e.task for e in events} == {"b"}
    assert trainer.adapter("a").metadata.training.startswith("1 steps")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "no tasks"),
        ([make_task(), make_task()], "occur twice: task"),
        ([make_task(layers="7")], "no layer 7"),
        ([make_task(layers="x")], "numbers and ranges"),
        ([make_task(sites="*.up_proj", layers="2-4")], r"layers: \[3, 4\]"),
        ([make_task(sites="res_with_attn")], "is no module's output"),
        ([make_task(train="head")], "which only encoders' adapters have"),
        ([make_task(sites="model.*.nothing")], "no linear module matches"),
        (
            [Task("t", [Example((1,) * 3000, (0,))], TrainingOptions(learning_rate=1.0))],
            "longest example has 3001 tokens",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(training_base, tasks, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Trainer(training_base, tasks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"schedule": "cubic"}, "one of linear, cosine, constant"),
        ({"warmup": 1}, "warmup is 1"),
        ({"warmup_steps": 0.5}, "warmup_steps is 0.5"),
        ({"metric": "kendall"}, "one of loss, accuracy, matthews, pearson"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(InvalidArgumentError, match=message):
        TrainingOptions(**values)


def test_the_rate_rises_then_falls_to_nothing():
    options = TrainingOptions(warmup=0.2)
    factors = [rate_factor(options, step, 10) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 8)
    in_steps = dataclasses.replace(options, warmup_steps=2)
    assert [rate_factor(in_steps, step, 10) for step in range(10)] == factors
    assert rate_factor(in_steps, 2, 1000) == 1
    cosine = dataclasses.replace(options, schedule="cosine")
    assert rate_factor(cosine, 6, 10) == pytest.approx(0.5)
    assert default_learning_rate(135_000_000) == 0.02


def test_every_example_comes_once_an_epoch_in_an_order_of_its_seed():
    lengths = [i % 7 for i in range(50)]
    stream = BatchStream(lengths, 8, seed=3)
    epochs = [[stream.next() for _ in range(stream.batches_per_epoch)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(50))
    assert epochs[0] != epochs[1]
    again, other = BatchStream(lengths, 8, seed=3), BatchStream(lengths, 8, seed=4)
    again.position = 9
    assert again.next() == epochs[1][2]
    assert other.next() != epochs[0][0]
