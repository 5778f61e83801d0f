"""What MoCo v2 alone has: the queue, and a target that is always shuffled."""

import pytest
import torch
import torch.nn.functional as F
from pool import build, small_args, views_of

import mocov2_asym as M
from common.augment import rng


@pytest.mark.parametrize("size, batch", [(12, 4), (10, 4), (7, 5), (5, 5), (5, 8), (3, 10), (1, 4)])
def test_the_queue_is_first_in_first_out(size, batch):
    model = build(M, small_args(M, f"--queue {size}"))
    expected = model.queue.tolist()  # oldest first
    for i in range(7):
        keys = torch.randn(batch, 16, generator=rng(i))
        model.enqueue(keys)
        expected = (expected + keys.tolist())[-size:]
        oldest = model.queue_ptr.item()
        assert model.queue.roll(-oldest, 0).tolist() == expected


@pytest.mark.parametrize("flags", ["", "--mean-enc 3", "--multicrop-src --multicrop-tgt"])
def test_a_step_enqueues_one_key_of_each_image_after_the_loss(flags):
    """The mean of the large views, normalised; no small crops. So no image meets its own key."""
    args = small_args(M, flags)
    model = build(M, args)
    old, queues, encoded, info_nce = model.queue.clone(), [], [], model.info_nce
    torch.testing.assert_close(old.norm(dim=1), torch.ones(40))
    assert "queue" in model.state_dict()

    def spy(u, v, queue):
        queues.append(queue.clone())
        return info_nce(u, v, queue)

    model.info_nce = spy
    model.target.register_forward_hook(lambda net, inputs, z: encoded.append(z))
    src, tgt, generator = views_of(M, args)
    model(src, tgt, 0.9, generator)
    assert torch.equal(model.queue[:16], F.normalize(encoded[0][0]))
    assert torch.equal(model.queue[16:], old[16:]) and model.queue_ptr.item() == 16
    assert len(queues) == (49 if "multicrop" in flags else 1)
    assert all(torch.equal(queue, old) for queue in queues)
