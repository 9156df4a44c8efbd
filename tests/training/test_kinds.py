"""Encoders with heads and encoder-decoders, against transformers' own models."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import edited
from training.tiny_tasks import furthest, run
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from redmux.errors import InvalidArgumentError
from redmux_adapters import ffn_sites, parse_adapter, to_bytes
from redmux_adapters.train import Evaluated, Example, Task, Trainer, TrainingBase, TrainingOptions
from redmux_adapters.train.classifier import TrainedHead
from redmux_adapters.train.options import rate_factor
from redmux_adapters.train.stream import BatchStream

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip
ENCODERS = {
    "roberta": (RobertaConfig(**SIZES), RobertaForSequenceClassification, "roberta", "classifier."),
    "bert": (BertConfig(**SIZES), BertForSequenceClassification, "bert", ""),
    "electra": (
        ElectraConfig(**SIZES, embedding_size=32), ElectraForSequenceClassification, "electra",
        "classifier.",
    ),
    "distilbert": (
        DistilBertConfig(
            vocab_size=60, dim=32, n_layers=2, n_heads=2, hidden_dim=48, dropout=0.0,
            max_position_embeddings=40, initializer_range=0.2,
        ),
        DistilBertForSequenceClassification, "distilbert", "",
    ),
}  # fmt: skip


class NoTokenizer:
    eos_token_id = 2


def whole_and_base(name):
    """Transformers' model with its head, and our base: its encoder."""
    config, model_class, inner, _ = ENCODERS[name]
    torch.manual_seed(1)
    whole = model_class(config).eval().requires_grad_(False)
    bare = AutoModel.from_config(whole.config)
    bare.load_state_dict(getattr(whole, inner).state_dict(), strict=name != "roberta")
    if name == "roberta":
        bare.pooler = None
    return whole, TrainingBase.of(bare, NoTokenizer(), kind="classifier")


def texts(seed, count, num_labels):
    drawn = random.Random(seed)
    examples = []
    for _ in range(count):
        label = drawn.randrange(num_labels or 5)
        ids = [drawn.randrange(10, 60) for _ in range(drawn.randint(4, 12))]
        examples.append(Example((3, label + 4, *ids), label=label))
    return examples


def classify(name, num_labels, seed=0, **options):
    labels = tuple(f"label {i}" for i in range(num_labels))
    values = {"learning_rate": 0.01, "steps": 8, "batch_size": 4, "seed": seed, "eval_every": 4}
    return Task(
        name, texts(seed, 16, num_labels), TrainingOptions(**values | options),
        valid=texts(seed + 50, 6, num_labels), labels=labels,
    )  # fmt: skip


def last_held_out(events, name):
    return [e for e in events if isinstance(e, Evaluated) and e.task == name and e.is_best][-1]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_trained_head_is_one_of_transformers(name):
    whole, base = whole_and_base(name)
    trainer = Trainer(base, [classify("five", 5), classify("score", 0, seed=1)])
    events = run(trainer)
    adapter = parse_adapter(to_bytes(trainer.adapter("five")))
    prefix, inner = ENCODERS[name][3], ENCODERS[name][2]
    model = type(whole)(type(whole.config)(**whole.config.to_dict() | {"num_labels": 5})).eval()
    model.requires_grad_(False).load_state_dict(
        {**{k: v for k, v in whole.state_dict().items() if k.startswith(inner)},
         **{prefix + k: v for k, v in adapter.head.tensors.items()}}
    )  # fmt: skip
    valid = trainer.learners[0].task.valid
    with edited(model, {f"{inner}.{site}": edit for site, edit in adapter.edits.items()}):
        logits = torch.cat([model(input_ids=torch.tensor([e.inputs])).logits for e in valid])
    labels = torch.tensor([e.label for e in valid])
    told = last_held_out(events, "five")
    assert told.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)
    assert told.accuracy == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert adapter.head.config.labels == tuple(f"label {i}" for i in range(5))
    scored = last_held_out(events, "score")
    assert scored.accuracy is None
    assert trainer.adapter("score").head.config.problem_type == "regression"


def test_the_second_of_two_texts_is_told_by_its_types():
    whole, base = whole_and_base("bert")
    task = classify("pairs", 2, head="mean")
    valid = [e._replace(types=(0, 0) + (1,) * (len(e.inputs) - 2)) for e in task.valid]
    trainer = Trainer(base, [replace(task, valid=[*valid, task.valid[0]])])
    first = next(e for e in trainer.step() if isinstance(e, Evaluated))
    trainer.close()
    head = TrainedHead(base, "mean", task.labels, task.options.seed).parameters
    losses = []
    for example in [*valid, task.valid[0]]:
        types = example.types or [0] * len(example.inputs)
        inputs = {"input_ids": example.inputs, "token_type_ids": types}
        inputs = {name: torch.tensor([values]) for name, values in inputs.items()}
        pooled = whole.bert(**inputs).last_hidden_state[0].mean(0)
        logits = F.linear(pooled, head["classifier.weight"], head["classifier.bias"])
        losses.append(F.cross_entropy(logits, torch.tensor(example.label)).item())
    assert first.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize(("metric", "num_labels"), [("matthews", 2), ("pearson", 0)])
def test_the_best_vectors_can_be_those_of_the_best_correlation(metric, num_labels):
    _, base = whole_and_base("roberta")
    task = classify("task", num_labels, steps=12, eval_every=1, metric=metric)
    trainer = Trainer(base, [task])
    events = [event for event in run(trainer) if isinstance(event, Evaluated)]
    told = [-2.0, *(event.correlation for event in events)]
    assert all(e.is_best == (told[i] > max(told[:i])) for i, e in enumerate(events, 1))
    best = last_held_out(events, "task")
    assert best.correlation == max(told) > told[1]
    adapter = trainer.adapter("task")
    assert f", {metric} {best.correlation:.3f}, at step {best.step};" in adapter.metadata.evaluation
    head, valid = adapter.head.tensors, task.valid
    with edited(base.model, adapter.edits):
        states = [
            base.model(input_ids=torch.tensor([e.inputs])).last_hidden_state[0, 0] for e in valid
        ]
    x = torch.tanh(F.linear(torch.stack(states), head["dense.weight"], head["dense.bias"]))
    logits = F.linear(x, head["out_proj.weight"], head["out_proj.bias"])
    predicted = logits.argmax(-1).float() if num_labels else logits[:, 0]
    both = torch.stack((predicted, torch.tensor([float(e.label) for e in valid])))
    assert best.correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]), abs=1e-4)


def test_a_classifier_goes_on_from_an_adapter_with_its_head_and_edits():
    _, base = whole_and_base("roberta")
    first = Trainer(base, [classify("first", 3, train="ln")])
    run(first)
    start = first.adapter("first")
    options = {"train": "scale", "weight_decay": 0.5, "steps": 2, "seed": 9}
    with pytest.raises(InvalidArgumentError, match="activation_ln, which is not among the sites"):
        Trainer(base, [replace(classify("t", 3, **options), start=start)])
    plain = Trainer(base, [replace(classify("plain", 3), valid=())])  # its last vectors, then
    run(plain)
    start = plain.adapter("plain")
    assert all(edit.bias.any() for edit in start.edits.values())
    trainer = Trainer(base, [replace(classify("t", 3, **options), start=start)])
    events = run(trainer)
    baseline = next(event for event in events if isinstance(event, Evaluated))
    assert baseline.step == 0
    other = Trainer(base, [replace(classify("o", 3, seed=9), start=start)])
    (again,) = (e for e in other.step() if isinstance(e, Evaluated))
    other.close()
    assert again.loss == pytest.approx(baseline.loss)  # vectors and head are the adapter's
    (learner,) = trainer.learners
    for site, edit in trainer._bank.edits(learner._vectors()["values"], learner.sites).items():
        assert torch.equal(edit.bias, start.edits[site].bias)  # frozen, decay or not
        assert not torch.equal(edit.scale, start.edits[site].scale)
    with pytest.raises(InvalidArgumentError, match="has a head for label 0, label 1, label 2"):
        Trainer(base, [replace(classify("t", 2), start=start)])
    with pytest.raises(InvalidArgumentError, match="has a head of kind 'roberta'"):
        Trainer(base, [replace(classify("t", 3, head="mean"), start=start)])


@pytest.mark.parametrize(
    ("metric", "num_labels", "message"),
    [("pearson", 3, "is for scores; it learns labels"), ("matthews", 0, "it learns scores")],
)
def test_a_metric_of_something_else_is_refused(metric, num_labels, message):
    with pytest.raises(InvalidArgumentError, match=message):
        classify("task", num_labels, metric=metric)


def test_a_head_can_be_trained_without_an_edit():
    _, base = whole_and_base("bert")
    trainer = Trainer(base, [classify("alone", 2, train="head"), classify("edited", 2)])
    initial = {name: p.detach().clone() for name, p in trainer.learners[0].head.parameters.items()}
    run(trainer)
    alone, edited_too = trainer.learners
    assert not alone._vectors()["values"].any()
    assert edited_too._vectors()["values"].any()
    assert any((alone._vectors()[name] != values).any() for name, values in initial.items())


def test_head_and_vectors_learn_as_by_hand():
    _, base = whole_and_base("roberta")
    task = classify("task", 3, label_smoothing=0.1, head_learning_rate=0.02)
    trainer = Trainer(base, [task, classify("beside", 7, seed=3)])
    run(trainer)
    head = TrainedHead(base, "roberta", task.labels, task.options.seed).parameters
    edits = {site: _Vectors(dim) for site, dim in ffn_sites(base.model).items()}
    vectors = [p for edit in edits.values() for p in (edit.scale, edit.bias)]
    optimizer = torch.optim.AdamW(
        [{"params": vectors}, {"params": list(head.values())}], weight_decay=0.0
    )
    stream = BatchStream([e.length for e in task.train], 4, 0)
    for step in range(8):
        batch = [task.train[i] for i in stream.next()]
        with edited(base.model, edits):
            states = [
                base.model(input_ids=torch.tensor([e.inputs])).last_hidden_state[0, 0]
                for e in batch
            ]
        x = torch.tanh(F.linear(torch.stack(states), head["dense.weight"], head["dense.bias"]))
        logits = F.linear(x, head["out_proj.weight"], head["out_proj.bias"])
        loss = F.cross_entropy(logits, torch.tensor([e.label for e in batch]), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*vectors, *head.values()], 1.0)
        for group, rate in zip(optimizer.param_groups, (0.01, 0.02), strict=True):
            group["lr"] = rate * rate_factor(task.options, step, 8)
        optimizer.step()
    result = trainer.learners[0]._vectors()
    for name, parameter in head.items():
        torch.testing.assert_close(result[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    ours = trainer._bank.edits(result["values"], edits)
    for site, edit in edits.items():
        torch.testing.assert_close(ours[site].scale, edit.scale.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours[site].bias, edit.bias.detach(), rtol=1e-3, atol=1e-4)


class _Vectors:
    def __init__(self, dim):
        self.scale = torch.ones(dim, requires_grad=True)
        self.bias = torch.zeros(dim, requires_grad=True)


def test_heads_trained_together_are_those_trained_alone_and_restored():
    _, base = whole_and_base("roberta")
    tasks = [classify("a", 3), classify("b", 2, seed=1, head="mean"), classify("c", 0, seed=2)]
    together = Trainer(base, tasks)
    for _ in range(3):
        together.step()
    state = together.state()
    run(together)
    restored = Trainer(base, tasks)
    restored.restore(state)
    run(restored)
    for task in tasks:
        alone = Trainer(base, [task])
        run(alone)
        one, other = together.adapter(task.name), alone.adapter(task.name)
        assert furthest(one, other) < 1e-4
        for name, tensor in one.head.tensors.items():
            torch.testing.assert_close(tensor, other.head.tensors[name], rtol=1e-3, atol=1e-4)
        assert restored.adapter(task.name).digest == one.digest


def test_a_head_on_a_pooler_that_is_not_there_is_refused():
    _, base = whole_and_base("roberta")
    with pytest.raises(InvalidArgumentError, match="stands on a pooler"):
        Trainer(base, [classify("a", 3, head="bert")])


T5 = T5Config(
    vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip


@pytest.mark.parametrize(("sites", "num_sites"), [("ffn", 4), ("res_with_attn", 10)])
def test_encoder_decoders_learn_the_loss_of_transformers(sites, num_sites):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5)
    base = TrainingBase.of(model, NoTokenizer(), kind="seq2seq")
    drawn = random.Random(0)
    pairs = [
        Example(
            tuple(drawn.randrange(3, 60) for _ in range(drawn.randint(2, 9))),
            (7, 8) * drawn.randint(1, 3) + (1,),
        )
        for _ in range(12)
    ]
    options = TrainingOptions(
        learning_rate=0.05, steps=10, batch_size=4, eval_every=10, sites=sites
    )
    trainer = Trainer(base, [Task("t", pairs, options, valid=pairs[:5])])
    events = run(trainer)
    told = last_held_out(events, "t").loss
    adapter = trainer.adapter("t")
    assert len(adapter.sites) == num_sites  # of both stacks

    def loss(edits):
        with edited(model, edits), torch.no_grad():
            terms = [
                F.cross_entropy(
                    model(
                        input_ids=torch.tensor([e.inputs]), labels=torch.tensor([e.targets])
                    ).logits[0],
                    torch.tensor(e.targets),
                    reduction="none",
                )
                for e in pairs[:5]
            ]
        return float(torch.cat(terms).mean())

    assert told == pytest.approx(loss(adapter.edits), rel=1e-4)
    assert told < loss({})
