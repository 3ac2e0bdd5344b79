"""Where the values of the models of transformers come from."""

import pytest
from transformers import CONFIG_MAPPING

from benchmarks.sweep import build, plan_type, sweep

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers has to say of default configurations

SAMPLE = ["albert", "bert", "falcon", "gpt2", "gpt_neox", "llama", "mamba", "mixtral", "qwen3", "t5", "vit", "whisper"]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_every_tensor_has_one_source_and_nearly_all_bytes_are_pointwise(model_type):
    outcome = plan_type(model_type, build(model_type))
    assert outcome.error == ""
    assert outcome.num_tensors == outcome.num_once > 0
    assert outcome.pointwise_bytes > 0.999 * (outcome.pointwise_bytes + outcome.opaque_bytes)


def test_what_is_opaque_says_why():
    outcome = plan_type("mamba", build("mamba"))
    causes = {path.rpartition(".")[2]: cause for path, cause, _ in outcome.opaque}
    assert causes == {"bias": "add takes several tensors that are drawn"}  # dt + log(-expm1(-dt))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_all_types_that_build_on_meta():
    outcomes = list(sweep(sorted(CONFIG_MAPPING)))
    assert len(outcomes) > 500
    planned = [outcome for outcome in outcomes if not outcome.error]
    assert len(planned) > 0.9 * len(outcomes)
    # the others have tensors that only a constructor writes, and say so
    assert all("no init code writes it" in o.error or "plain attribute" in o.error for o in outcomes if o.error)
    assert all(outcome.num_tensors == outcome.num_once for outcome in planned)
    pointwise, opaque = sum(o.pointwise_bytes for o in planned), sum(o.opaque_bytes for o in planned)
    assert pointwise > 0.99 * (pointwise + opaque)
