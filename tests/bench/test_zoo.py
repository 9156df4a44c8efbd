"""The zoo's scores against cases counted by hand, its choices and tables."""

import copy
import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from redmux_adapters import Edit, read_adapter
from redmux_adapters.train import Example as TokenExample
from redmux_adapters.train import Task, TrainingBase, TrainingOptions
from redmux_adapters.train.objectives import GenerationObjective, Row
from redmux_bench.lora import LoraBank, LoraTrainer
from redmux_bench.plain_model import edited, greedy
from redmux_bench.tables import markdown

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "zoo"))

import model as models
import quality
import scores
import served
from examples import Example, few_shot_prompt, prompt, read_examples, write_examples
from found import Found, written
from part_base import choose_shots
from plan import Plan
from restyle import restyled
from styles import PIRATE
from tasks import TASKS
from trainings import choose

BUNDLED = sorted(path.parent.name for path in served.ZOO.glob("*/adapter_config.json"))


def of_targets(*targets, user="text"):
    return [Example(user, target, (target,)) for target in targets]


# --- scores ---------------------------------------------------------------------------------------


def test_slots_are_counted_pair_by_pair_and_broken_json_has_none():
    examples = of_targets(*(json.dumps(v) for v in ({"a": "1", "b": ["2", "3"]}, {}, {"a": "4"})))
    outputs = ['{"a": "1", "b": ["2"], "c": "9"}', "{}", '{"a": "4"']
    found = scores.score_json(examples, outputs)
    # 2 of 3 said are right, of 4 in the references; the last output says nothing.
    assert found["slot_f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["exact"] == found["always_empty"] == pytest.approx(1 / 3)
    assert found["valid_json"] == pytest.approx(2 / 3)


def test_intents_count_beside_their_slots():
    examples = of_targets(
        '{"intent": "Play", "slots": {"x": "1"}}', '{"intent": "Rate", "slots": {}}'
    )
    outputs = ['{"intent": "Play", "slots": "none"}', '[{"intent": "Rate"}]']
    found = scores.score_json(examples, outputs)
    assert found == {"slot_f1": 0, "exact": 0, "valid_json": 0.5, "intent_accuracy": 0.5}


def test_a_label_counts_letter_for_letter():
    found = scores.score_router(
        of_targets("work", "out_of_scope", "out_of_scope", "home"),
        [" work\n", "out_of_scope", "home", "Home"],
    )
    assert found == {"accuracy": 0.5, "most_frequent": 0.5, "out_of_scope_recall": 0.5}


@pytest.mark.parametrize(
    ("said", "friendly"),
    [
        ("A family friendly pub.", True),
        ("It is not family-friendly.", False),
        ("It isn't for children.", False),
        ("A pub for adults.", False),
        ("A pub.", None),
    ],
)
def test_families_count_only_where_the_answer_is_right_about_them(said, friendly):
    for wanted in (True, False):
        user = f"name[Zizzi], familyFriendly[{'yes' if wanted else 'no'}]"
        found = scores.score_restaurant([Example(user, "", ("a b c d",))], [said])
        assert found["familyFriendly_stated"] == (friendly is wanted), said
        assert found["name_stated"] == 0


def test_style_counts_its_forms_and_the_plain_words():
    example = Example("What is it?", "", ("a cooking machine",))
    found = scores.score_style(
        PIRATE, [example, example], ["Arr! Aye, th' cookin' pot", "A machine"]
    )
    assert found["three_marks"] == 0.5
    assert found["marks_per_100_words"] == pytest.approx(100 * 4 / 7)
    assert found["content_recall"] == pytest.approx(0.5)  # "cooking" once, "machine" once


def test_gleu_is_full_for_the_reference_and_punishes_kept_errors():
    source = "He go to a school and he like the teacher very much ."
    reference = "He goes to school and he likes the teacher very much ."
    full = scores.gleu([source], [[reference]], [reference])
    kept = scores.gleu([source], [[reference]], [source])
    half = scores.gleu([source], [[reference]], [source.replace("like", "likes")])
    assert full == pytest.approx(100)
    assert kept < half < full


def test_gleu_by_hand():
    # The output has 4 of the reference's 5 words and its brevity costs nothing. Of n-grams that it
    # shares, those that it kept from the source against the reference are taken off: 6 - 1 of 7.
    source, reference, output = "a b c d e f q", "a b c d e f r", "a b c d e f q"
    grams = torch.tensor([(6 - 1) / 7, (5 - 1) / 6, (4 - 1) / 5, (3 - 1) / 4])
    expected = 100 * float(grams.log().mean().exp())
    assert scores.gleu([source], [[reference]], [output]) == pytest.approx(expected)
    # Four right words of six, too short: exp(1 - 6 / 4).
    brief = scores.gleu(["x"], [["a b c d e f"]], ["a b c d"])
    assert brief == pytest.approx(100 * float(torch.tensor(1 - 6 / 4).exp()))


# --- choices --------------------------------------------------------------------------------------


def test_the_lowest_held_out_loss_of_a_task_and_method_is_chosen():
    def run(method, loss, diverged=False):
        return {
            "task": "a", "method": method, "valid_loss": loss, "diverged": diverged, "chosen": False
        }  # fmt: skip

    runs = [run("RED", 2.0), run("RED", 1.0), run("RED", 0.5, True), run("RED++", None)]
    choose(runs)
    assert [r["chosen"] for r in runs] == [False, True, False, False]


def test_shots_are_rich_ones_or_different_ones_with_the_shortest():
    train = [Example(f"u{i}", "{}" if i % 2 else "x" * i) for i in range(30)]
    shots = choose_shots(train)
    assert [len(e.target) for e in shots["rich"]] == [24, 26, 28]
    assert min(len(e.target) for e in shots["mixed"]) == 0
    assert len({e.target for e in shots["mixed"]}) == 3


def test_small_data_takes_its_share_of_the_steps(tmp_path):
    plan = Plan(
        "", "", str(tmp_path), "cpu", "float32", ("banking",), 100, 4, 9, 9, 9, 64, 99, 1, 0
    )
    plan.save()
    assert Plan.read(str(tmp_path)) == plan
    assert plan.chosen_steps(100) == 100
    plan.choose_steps(40)
    assert plan.chosen_steps(100) == 40
    assert plan.options("banking", 40, 0.02).steps == 40
    assert plan.options("pirate", 40, 0.02).steps == 20
    assert plan.options("banking", 40, 0.02).eval_every == 5


def test_the_adapters_prompt_is_the_bare_text_and_the_base_models_has_an_instruction():
    assert prompt("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    shot = Example("one", "1")
    assert few_shot_prompt("Count.", [shot], "two", "turns") == (
        "<|im_start|>user\nCount.\n\none<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Input: one\nOutput: 1\n\nInput: two\nOutput:" in few_shot_prompt(
        "", [shot], "two", "text"
    )


def test_a_style_is_put_on_the_plain_answers_and_in_the_test_on_the_data_sets_own():
    examples = [Example("q", "You and me"), Example("other", "x")]
    (train,) = restyled(PIRATE, examples, "train", {"q": "It is the end"})
    assert "It be th' end" in train.target
    assert "Ye an' me" in restyled(PIRATE, examples, "test", {})[0].target


# --- models ---------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token per letter."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) % 100 for c in text.replace("<|im_end|>", "\x02")]}


@pytest.fixture
def tiny():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_greedy_answers_of_a_batch_are_those_of_each_prompt_alone(tiny):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    alone = [greedy(tiny, [prompt], 6, end=99)[0] for prompt in prompts]
    assert greedy(tiny, prompts, 6, end=99) == alone
    assert [len(row) for row in alone] == [6, 6, 6]
    end = alone[1][2]
    assert greedy(tiny, prompts[1:2], 6, end)[0] == alone[1][: alone[1].index(end) + 1]


def test_a_plain_model_is_edited_inside_the_block_alone(tiny):
    site = "model.layers.1.mlp.down_proj"
    edit = Edit(1 + 0.1 * torch.randn(32), 0.1 * torch.randn(32))
    ids, module, seen = torch.tensor([[1, 2, 3]]), tiny.get_submodule(site), []
    plain = tiny(ids).logits
    with edited(tiny, {site: edit}):
        handle = module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
        assert not torch.allclose(tiny(ids).logits, plain, atol=1e-3)
    handle.remove()
    ((x, out),) = seen
    torch.testing.assert_close(out, module(x) * edit.scale + edit.bias)
    assert torch.equal(tiny(ids).logits, plain)


def test_the_likeliest_label_is_that_of_one_text_at_a_time(tiny):
    prompts, answers = ["abc", "hello there", "x"], ["yes", "no", "maybe so"]
    expected = []
    for text in prompts:
        totals = []
        for answer in answers:
            start = Letters()(text)["input_ids"]
            target = Letters()(answer + "<|im_end|>")["input_ids"]
            logits = tiny(torch.tensor([start + target])).logits.log_softmax(-1)
            rows = logits[0, len(start) - 1 : -1]
            totals.append(rows[range(len(target)), target].sum().item())
        expected.append(answers[totals.index(max(totals))])
    assert models.likeliest(tiny, Letters(), prompts, answers) == expected


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_lora_in_a_bank_has_the_losses_and_gradients_of_plain_peft(tiny):
    bank = LoraBank(tiny, [0, 1], 4, ("q_proj", "v_proj"))
    objective = GenerationObjective(TrainingBase("", "causal", bank, None, ""), bank, False)
    drawn = torch.Generator().manual_seed(5)
    bank.values.add_(0.1 * torch.randn(bank.values.shape, generator=drawn))
    examples = [
        (0, TokenExample((1, 2, 3), (4, 5))), (1, TokenExample((6, 7), (8, 9, 10))),
        (0, TokenExample((3,), (11,))),
    ]  # fmt: skip
    rows = [Row(owner, example, weight=0.3) for owner, example in examples]
    objective.run(rows, True)
    for owner in range(2):
        bank.activate(owner)
        parameters = bank.weights(owner).values()
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        for (number, example), row in zip(examples, rows, strict=True):
            if number == owner:
                ids = torch.tensor([example.inputs + example.targets])
                logits = bank.peft(input_ids=ids).logits[0, len(example.inputs) - 1 : -1]
                loss = torch.nn.functional.cross_entropy(
                    logits, torch.tensor(example.targets), reduction="sum"
                )
                assert row.loss == pytest.approx(loss.item(), abs=1e-4)
                (0.3 * loss).backward()
        grads = torch.cat([parameter.grad.flatten() for parameter in parameters])
        torch.testing.assert_close(bank.grads[owner], grads, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_lora_trained_beside_others_is_that_of_a_training_alone(tiny):
    def trained(seeds):
        torch.manual_seed(9)
        base = TrainingBase.of(copy.deepcopy(tiny), None)
        tasks = [
            Task(
                str(seed), [TokenExample((i, seed), (i + seed, 7)) for i in range(6)],
                TrainingOptions(learning_rate=0.01, steps=3, batch_size=2, seed=seed, eval_every=3),
                [TokenExample((3, seed), (4,))],
            )
            for seed in seeds
        ]  # fmt: skip
        trainer = LoraTrainer(base, tasks, 2, ("q_proj",), max_pass_tokens=64)
        while trainer.active:
            trainer.step()
        return [learner.result()["values"] for learner in trainer.learners]

    together, alone = trained([1, 2]), trained([2])
    torch.testing.assert_close(together[1], alone[0])
    assert not torch.allclose(together[0], together[1], atol=1e-3)


# --- tables and adapters --------------------------------------------------------------------------


def run_of(task, method, **changes):
    return {
        "task": task, "method": method, "rate": 0.02, "parameters": 10, "steps": 8,
        "batch_size": 2, "examples": 20, "tokens": 100, "together": 2, "together_s": 3.0,
        "valid_loss": 0.5, "best_step": 8, "chosen": True, "n": 4,
        "ending": "cancelled" if "LoRA" in method else "completed",
        "scores": {"accuracy": 0.75, "most_frequent": 0.5},
    } | changes  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """The files of a small run on one task, as `collect` leaves them."""
    methods = {"RED": 0.02, "RED++": 0.02, "LoRA r=8": 0.001, "LoRA r=16": 0.001}
    base = {
        "n": 4, "forms": {"turns, rich shots": 0.5}, "form": "turns, rich shots",
        "zero_shot": {"accuracy": 0.0}, "few_shot": {"accuracy": 0.25},
        "zero_shot_likelihood": {"accuracy": 0.5},
    }  # fmt: skip
    found = {
        "machine": {"device": "a GPU"}, "base": {"sentiment": base},
        "runs": [run_of("sentiment", m, rate=rate) for m, rate in methods.items()],
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(found))
    with (tmp_path / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["task", "method", "rate", "step", "split", "loss", "accuracy"])
        for method, rate in methods.items():
            for step in (0, 4, 8) if method.startswith("RED") else (0, 4):
                rows.writerow(["sentiment", method, rate, step, "valid", f"{8 - step / 2:g}", 0.5])
    return tmp_path


def test_same_step_losses_are_those_where_lora_was_judged_last(results):
    assert quality.same_step(Found.read(results)).splitlines()[2:] == [
        "| sentiment | 4 | 6.000 | 6.000 | 6.000 | 6.000 |"
    ]


def test_the_table_of_scores_has_a_row_per_score(results):
    lines = quality.scores(Found.read(results), {}).splitlines()
    assert lines[2:] == ["| sentiment | accuracy | 4 | 0 % | 25 % | 50 % | 75 % | 75 % |"]


def test_a_later_run_completes_a_training_that_was_stopped(results):
    later = Found(
        {"runs": [run_of("sentiment", "LoRA r=8", rate=0.001, ending="completed", together_s=9.0,
                         scores={"accuracy": 1.0, "most_frequent": 0.5})]},
        [{"task": "sentiment", "method": "LoRA r=8", "rate": "0.001", "step": "8",
          "split": "valid", "loss": "1.5", "accuracy": "0.5"}],
    )  # fmt: skip
    found = Found.read(results).with_later(later)
    assert found.curve("sentiment", "LoRA r=8", 0.001) == {8: 1.5}
    assert found.curve("sentiment", "LoRA r=16", 0.001) == {0: 8.0, 4: 6.0}
    line = quality.scores(found, {}).splitlines()[2]
    assert line == "| sentiment | accuracy | 4 | 0 % | 25 % | 50 % | 75 % | 75 % | 100 % |"
    assert "| LoRA r=8 | 10 | 1 | 0.001 | 8 | 100 | 9 |" in quality.trainings(found)
    (stopped,) = quality.same_step(found).splitlines()[2:]
    assert stopped.startswith("| sentiment | 4 | 6.000 | 6.000 | ")
    assert quality.final_losses(found).splitlines()[2:] == []  # r=16 is not at its end


def test_losses_and_trainings_of_completed_loras_are_told_apart_from_stopped_ones(results):
    runs = [
        run_of("sentiment", m, rate=0.001, ending="completed", together_s=s, valid_loss=loss)
        for m, s, loss in (("LoRA r=8", 9.0, 0.4), ("LoRA r=16", 11.0, 0.3))
    ]
    other = run_of("pirate", "LoRA r=8", rate=0.001, ending="completed", together_s=5.0)
    found = Found.read(results).with_later(Found({"runs": [*runs, other]}, []))
    assert quality.final_losses(found).splitlines()[2:] == [
        "| sentiment | 0.500 | 0.500 | 0.400 | 0.300 |"
    ]
    assert "| LoRA r=8 | 10 | 2 | 0.001 | 8 | 200 | 14 |" in quality.trainings(found)


def test_a_missing_training_is_named(results):
    with pytest.raises(KeyError, match="no training of RED on pirate"):
        Found.read(results).run("pirate", "RED")


def test_scores_are_written_as_shares_or_numbers():
    assert written("accuracy", 0.126) == "13 %"
    assert written("slot_f1", 0.126) == "0.13"
    assert written("bleu", 36.92) == "36.9"
    assert written("bleu", None) == "-"
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"


@pytest.mark.parametrize("task", BUNDLED)
def test_every_bundled_adapter_has_a_card_of_itself_and_a_task_with_its_licence(task):
    adapter, text = read_adapter(served.ZOO / task), (served.ZOO / task / "README.md").read_text()
    assert adapter.digest in text
    assert adapter.num_parameters == 34_560
    assert adapter.metadata.license == TASKS[task].license
    assert f"License of the vectors: {adapter.metadata.license}" in text
    assert "## Limits" in text
    assert f"[{task}]({task}/README.md)" in (served.ZOO / "README.md").read_text()


def test_the_demo_asks_every_bundled_adapter_twice():
    demo = json.loads((served.ZOO / "demo.json").read_text(encoding="utf-8"))
    assert sorted(item["adapter"] for item in demo) == sorted(BUNDLED * 2)


def test_served_test_texts_are_the_first_of_the_data_in_the_tasks_style(tmp_path):
    write_examples(tmp_path / "pirate.test.jsonl", [Example(f"q{i}", "the end") for i in range(3)])
    examples = served.test_examples(tmp_path, "pirate", 2)
    assert [e.user for e in examples] == ["q0", "q1"]
    assert all("th' end" in e.target for e in examples)
    assert len(read_examples(tmp_path / "pirate.test.jsonl")) == 3
