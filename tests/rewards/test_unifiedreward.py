"""Served judges against a chat server that judges by brightness and fails on purpose."""

from __future__ import annotations

import math
import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_rewards
from support.chat_server import ChatServer, brightness_grade, caption, decode

from tafs.common.errors import RunFailed
from tafs.data.prompts import Prompt
from tafs.rewards import chat
from tafs.rewards.chat import Missing, wait_ready
from tafs.rewards.geneval2 import GenEval2, accepted, first_tokens
from tafs.rewards.unifiedreward import UnifiedReward, UnifiedReward2, axis_grades, grade

SIDE = 16


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(chat, "FIRST_PAUSE", 0.01)


def scorer(server: ChatServer, **changes) -> UnifiedReward:
    return UnifiedReward(server.url, **{"side": SIDE, "timeout": 5.0, "workers": 8, **changes})


def grey(count: int, side: int = SIDE) -> torch.Tensor:
    """Uniform images from black to white."""
    return torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def captions(count: int) -> list[Prompt]:
    return [Prompt(f"caption {i}", {}) for i in range(count)]


def expected(images: torch.Tensor) -> torch.Tensor:
    pixels = (images * 255).round().to(torch.uint8).numpy()
    return torch.tensor([brightness_grade(p) for p in pixels]) / 5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ELEMENTS = "cat (animal): 1\nblack (color): 0\n2 (count): 1\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Final Score: 4", 4),
        ("Final Score:3.25", 3.25),
        ("Final Score: 4.67\n", 4.67),
        (ELEMENTS + "Final Score: 2.5", 2.5),
        (ELEMENTS + "\nFinal Score: 3.0<|im_end|>", 3),
        ("Alignment Score: 2\nOverall Image Quality: 4\nFinal Score: 3", 3),
        ("Final Score: 5.", 5),
        ("Final Score: 5.0. The image shows 2 cats.", 5),
        ("Final Score: 4, because the 3 dogs are blurred.", 4),
        ("The dog has 5 legs.\n\n**Final Score:** 1", 1),
        ("**Final Score**: 2", 2),
        ("**Final Score: 3.5**", 3.5),
        ("Final Score: **4**", 4),
        ("### Final Score:\n\n4.3", 4.3),
        ("Final Score: 4\n- 2 dogs are missing", 4),
        ("Final Score: 4/5", 4),
        ("Final Score: 4.5 / 5.0", 4.5),
        ("Final Score: 3 out of 5.", 3),
        ("Final Score (1-5): 4", 4),
        ("Final Score: [4]", 4),
        ("Final Score: $\\boxed{4}$", None),
        ('{"Final Score": 3.7}', 3.7),
        ("final score: 4", 4),
        ("FINAL SCORE: 2", 2),
        ("The final score is 4.", 4),
        ("I give it a final score of 2.", 2),
        ("Final Score: 3\nAgain, Final Score: 3", 3),
        ("Final Score: 4.0\n**Final Score: 4**", 4),
        ("Final Score: 4.0, so that the grade is 4. Final Score: 4.00", 4),
        ("After 'Final Score:' I give the grade.\nFinal Score: 4", 4),
        ("Final Score: N/A at first.\nFinal Score: 2", 2),
        ("4", 4),
        (" 3.7\n", 3.7),
        ("**4.0**", 4),
        ("Score: 4", 4),
        ("Final: 4/5", 4),
        *[
            (text, None)
            for text in (
                *("", " ", "Final", "Final Score", "Final Score:", "Final Score: .", "F", "nan"),
                *("This image shows 4 cats.", "Image 2 of 4", "1. Alignment: 4\n2. Quality: 3"),
                *(ELEMENTS, "Alignment Score: 4", "Final Score: 2 Final Score: 3"),
                *("Final Score: 3-4", "Final Score: 3 to 4", "Final Score: 4 or 5", "3-4"),
                *("Final Score: 4/10", "Final Score: 8 out of 10", "4/10", "Final Score: 4/50"),
                *("**Final Score: 4** / 10", "Final Score: **3** - **4**", "Final Score: 4–5"),
                *("Final Score: four", "Final Score: 4,5", "Final Score: nan", "Final Score: -2"),
                *("Final Score: 4.5.1", "Final Score: 4th", "Final Score: 80%", "Final Score: 1e0"),
                "assign a score from 1 to 5 after 'Final Score:'.\nText Caption: [3 dogs]",
            )
        ],
    ],
)
def test_the_grade_is_the_number_after_final_score_or_missing(text, number):
    if number is None:
        with pytest.raises(Missing, match="^no_score$"):
            grade(text)
    else:
        assert grade(text) == number


@pytest.mark.parametrize("start", ["", "Final Score", "Final Score:", "Final"])
@pytest.mark.parametrize("part", [" ", "*", "9", "(", "Final "])
def test_a_long_answer_is_read_at_once(start, part):
    with pytest.raises(Missing):
        grade(start + part * 100_000 + "x")


@pytest.mark.parametrize("number", ["0", "0.99", "5.01", "6", "7.5", "10", "45", "100"])
@pytest.mark.parametrize("form", ["Final Score: {}", "**Final Score**: {}.", "{}", "{}/5"])
def test_a_grade_outside_1_to_5_is_out_of_range(form, number):
    with pytest.raises(Missing, match="^out_of_range$"):
        grade(form.format(number))


@given(number=st.integers(10, 50).map(lambda n: n / 10), text=st.text("abc 123.:*\n", max_size=40))
def test_grades_are_those_of_the_published_readers(number, text):
    """In answers with one "Final Score:", the last of them and the first before a digit."""
    answer = f"{text}\nFinal Score: {number}\n"
    first = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", answer)
    last = answer.split("Final Score:")[-1].strip()
    assert first and grade(answer) == float(first[1]) == float(last) == number


def test_scores_are_the_servers_grades_in_the_order_of_the_images():
    images = grey(40)
    with ChatServer() as server:
        wait_ready(server.url, 5)
        reward = scorer(server)
        scores = reward(images, captions(40))
    torch.testing.assert_close(scores, expected(images))
    assert scores.dtype == torch.float32
    assert scores.min() == 0.2 and scores.max() == 1.0
    assert reward.reward().record() == {
        "name": "unifiedreward",
        "scale": "5",
        "version": "UnifiedReward-7b-v1.5",
        "asked": "40",
        "missing": "0",
    }


def test_a_request_contains_the_exact_image_and_the_question():
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    with ChatServer() as server:
        scorer(server)(image, [Prompt("a {red} dog", {})])
        scorer(server, side=8)(image, captions(1))
        request, resized = server.requests
    assert decode(resized).shape == (8, 8, 3)
    pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(decode(request).copy()), pixels)
    assert caption(request) == "[a {red} dog]"
    assert request["temperature"] == 0
    assert request["max_tokens"] == 512
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]


def test_there_are_at_most_as_many_parallel_requests_as_workers():
    with ChatServer(faults={"slow": 1.0}, delay=0.5) as server:
        scorer(server, workers=3)(grey(9), captions(9))
        assert server.most_in_flight == 3


def test_further_batches_are_asked_about_while_the_slowest_image_of_one_is_waited_for():
    images, prompts, last = grey(6), captions(6), threading.Event()

    class Slow(UnifiedReward):
        def value(self, prompt: Prompt, answers: Sequence[Any]) -> float:
            if prompt is prompts[-1]:
                last.set()
            if prompt is prompts[0]:
                assert last.wait(60)  # all other images are scored meanwhile
            return super().value(prompt, answers)

    with ChatServer() as server:
        reward = Slow(server.url, side=SIDE, workers=2, images=6)
        batches = [(images[i : i + 2], prompts[i : i + 2]) for i in (0, 2, 4)]
        found = list(reward.stream(batches))
        assert server.most_in_flight <= 2
    assert [len(scores) for scores in found] == [2, 2, 2] and reward.asked == 6
    torch.testing.assert_close(torch.cat(found), expected(images))


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with ChatServer() as server:
        assert scorer(server)(grey(2), captions(2)).isfinite().all()


@pytest.mark.parametrize("fault", ["status_500", "status_429", "drop"])
def test_transient_failures_are_retried(fault):
    images = grey(30)
    with ChatServer(faults={fault: 0.3}) as server:
        reward = scorer(server, attempts=12)
        torch.testing.assert_close(reward(images, captions(30)), expected(images))
        assert server.met[fault] > 5
        assert len(server.requests) == 30 + server.met[fault]
    assert reward.missing.total() == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nonsense", "no_score"),
        ("out_of_range", "out_of_range"),
        ("not_json", "malformed"),
        ("huge", "too_long"),
        ("status_400", "status_400"),
    ],
)
def test_an_answer_without_a_score_is_missing_and_counted_but_not_zero(fault, reason):
    images = grey(40)
    with ChatServer(faults={fault: 0.05}) as server:
        reward = scorer(server)
        scores = reward(images, captions(40))
        assert len(server.requests) == 40  # such an answer is not retried
    assert scores.isnan().sum() == 2
    known = ~scores.isnan()
    torch.testing.assert_close(scores[known], expected(images)[known])
    assert reward.missing == {reason: 2}
    record = reward.reward().record()
    assert record[f"missing.{reason}"] == record["missing"] == "2"


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": 4}}]}']
    + [b'{"choices": [{"message": {"content": null}}]}', b"[" * 100_000, b"\xff\xfe", b"9" * 5000],
)
def test_an_answer_other_than_a_chat_completion_is_malformed(answer):
    with pytest.raises(Missing, match="^malformed$"):
        chat.text_of(chat._choice(answer))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("status_500", "status_500"), ("drop", "connection_lost"), ("slow", "timeout")],
)
def test_a_persistent_failure_is_missing_and_counted(fault, reason):
    timeout = 1.0 if fault == "slow" else 30.0
    with ChatServer(faults={fault: 1.0}, delay=3.0) as server:
        reward = scorer(server, attempts=2, timeout=timeout, missing_share=1.0)
        assert reward(grey(3), captions(3)).isnan().all()
        assert len(server.requests) == 6
    assert reward.missing == {reason: 3}


def test_too_many_missing_scores_end_the_run_with_their_counts():
    with ChatServer(faults={"nonsense": 0.2, "out_of_range": 0.2}) as server:
        reward = scorer(server)
        with pytest.raises(RunFailed, match=r"21 of 200 images have no score from .*\(.*no_score"):
            reward(grey(200), captions(200))
        assert len(server.requests) < 200  # the rest is not sent
    assert reward.missing.total() == 21


def test_the_allowed_share_refers_to_the_images_of_all_calls():
    with ChatServer(faults={"nonsense": 0.2}) as server:
        reward = scorer(server, images=40, workers=1)
        for _ in range(2):
            assert reward(grey(10), captions(10)).isnan().sum() == 2
        with pytest.raises(RunFailed, match=r"5 of 40 .* \(5 no_score\); at most 4 may be missing"):
            reward(grey(10), captions(10))
    assert reward.missing == {"no_score": 5}


def test_an_unreachable_server_is_refused_by_its_url():
    url = f"http://127.0.0.1:{free_port()}"
    reward = UnifiedReward(url, attempts=2)
    with pytest.raises(RunFailed, match=f"no server at {url} .Connection refused.; start it"):
        reward(grey(3, 512), captions(3))


def test_an_unknown_model_is_refused_without_retries():
    with ChatServer(model="other") as server:
        reward = scorer(server)
        with pytest.raises(RunFailed, match="answers 404 .*'UnifiedReward-7b-v1.5'.*not exist"):
            reward(grey(1), captions(1))


def test_a_redirect_is_not_followed():
    with ChatServer(faults={"redirect": 1.0}) as server:
        with pytest.raises(RunFailed, match="answers 307"):
            scorer(server)(grey(1), captions(1))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "https://127.0.0.1:8000", "file:///etc/passwd", "http://127.0.0.1"),
        *("http://127.0.0.1:8000/v1", "http://127.0.0.1:80000", "http://127.0.0.1:8000?x=1"),
        *("http://me:secret@127.0.0.1:8000", "http://sérver:8000", "http://127.0.0.1:８０"),
    ],
)
def test_a_url_of_another_format_is_refused(url):
    with pytest.raises(ValueError, match="not the address of a chat server, http://HOST:PORT"):
        UnifiedReward(url)


def test_waiting_ends_without_a_server_and_names_its_url():
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RunFailed, match=f"{url} is not ready after 0.5 s .Connection refused."):
        wait_ready(url, 0.5)
    with pytest.raises(RunFailed, match="ended before it was ready"):
        wait_ready(url, 60, alive=lambda: False)


AXES = "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\nStyle Score (1-5): {}"


@pytest.mark.parametrize(
    ("text", "grades"),
    [
        (AXES.format(2.25), [4.5, 3, 2.25]),
        (f"**{AXES.format(2).replace('Score (1-5):', 'Score (1-5):** ')}", [4.5, 3, 2]),
        (AXES.format("5/5"), [4.5, 3, 5]),
        (AXES.format(2) + "\nStyle Score (1-5): 2", [4.5, 3, 2]),
        (AXES.format(2) + "\nStyle Score (1-5): 3", "no_score"),
        (AXES.format("X"), "no_score"),
        (AXES.format(2).removeprefix("Alignment"), "no_score"),
        (AXES.format(5.5), "out_of_range"),
        (AXES.format(0), "out_of_range"),
    ],
)
def test_unifiedreward_2_has_a_grade_for_each_axis(text, grades):
    if isinstance(grades, str):
        with pytest.raises(Missing, match=f"^{grades}$"):
            axis_grades(text)
    else:
        assert axis_grades(text) == grades


def test_unifiedreward_2_is_the_mean_of_its_axes_for_images_at_their_own_size():
    images = grey(5)
    with ChatServer(model="UnifiedReward-2.0-qwen-7b") as server:
        scores = UnifiedReward2(server.url, images=5)(images, captions(5))
        assert {decode(request).shape for request in server.requests} == {(SIDE, SIDE, 3)}
    # The server's grades are the brightness' b, b / 2 + 1 / 2 and 1.
    grades = 5 * expected(images)
    torch.testing.assert_close(5 * scores, (grades + (grades + 1) / 2 + 1) / 3, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with a tokenizer that spells words letter by letter."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny_rewards.qwen_tokenizer(folder)
    return folder


def test_geneval_2_accepts_the_spellings_of_the_published_script():
    assert accepted("Are the cows plastic?", "Yes") == ["Yes", "yes", " yes", " Yes"]
    spelled = {"four", "Four", " four", " Four", "4", " 4"}
    assert set(accepted("How many cows are in the image?", "four")) == spelled
    assert "other" in accepted("How many cows are in the image?", "eleven")


def answer(**tokens: float) -> dict:
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return {"logprobs": {"content": [{"token": "Y", "top_logprobs": top}]}}


def test_geneval_2_is_the_geometric_mean_of_the_right_answers_probabilities(vocabulary):
    judge = GenEval2("http://127.0.0.1:1", folder=vocabulary)
    pairs = [["How many cows are in the image?", "four"], ["Are the cows plastic?", "Yes"]]
    prompt = Prompt("four plastic cows", {"vqa_list": pairs})
    # The tokenizer spells letter by letter, so that "four" begins with f and "Four" with F.
    answers = [answer(f=0.25, F=0.125, N=0.5), answer(Y=0.5, y=0.25, n=0.1)]
    assert judge.value(prompt, answers) == pytest.approx((0.375 * 0.75) ** 0.5)
    assert judge.value(prompt, [answers[0], answer(n=1.0)]) == 0
    for broken in ({}, {"logprobs": None}, {"logprobs": {"content": []}}):
        with pytest.raises(Missing, match="^no_logprobs$"):
            first_tokens(broken)
    with pytest.raises(ValueError, match="GenEval 2 cannot judge 'a cow': its 'vqa_list' is not"):
        judge.questions(Prompt("a cow", {"vqa_list": ["How many?"]}))


def test_geneval_2_asks_the_server_for_the_first_token_of_each_answer(vocabulary):
    prompt = Prompt("two cows", {"vqa_list": [["Are there cows?", "Yes"], ["Are they?", "Yes"]]})
    with ChatServer(model="Qwen3-VL-8B-Instruct") as server:
        judge = GenEval2(server.url, folder=vocabulary, workers=1)
        scores = judge(grey(2), [prompt] * 2)
        requests = server.requests
    # The server says Yes with the image's brightness as its probability.
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0]))
    assert len(requests) == 4
    assert [requests[0][key] for key in ("max_tokens", "logprobs", "top_logprobs")] == [1, True, 20]
    assert requests[1]["messages"][0]["content"][1]["text"] == "Are they? Answer in one word."


def test_geneval_2_needs_its_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="reward geneval2: .*tokenizer.json is missing"):
        GenEval2("http://127.0.0.1:1", folder=tmp_path)
