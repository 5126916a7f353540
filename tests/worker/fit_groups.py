"""Groups that nothing is wrong with, and what asks for them."""

from bon_algos.acceptance import Requirements
from tests.worker import world

STUDENT = "pol-" + "0" * 16
WANTED = Requirements(
    reference_policy=world.BASE,
    reward_model=world.REWARD_MODEL,
    reward_template_digest=world.TEMPLATE,
    num_candidates=2,
)


def fit_groups(num_prompts, per_prompt=1, rewards=(0.0, 1.0)):
    return [
        world.group(f"g{prompt}-{i}", [0, 2 + prompt], rewards, created_at=1000.0 + i)
        for prompt in range(num_prompts)
        for i in range(per_prompt)
    ]
