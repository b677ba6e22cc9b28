"""Faults that implementations of these methods are known to have had, each with the tests that would find it here.

How it is averaged
  A mean over tokens is taken in each micro-batch, and the means averaged:
    train/test_policy_loss.py::test_a_presets_step_is_the_same_in_micro_batches_of_any_size_and_order
    train/test_step.py::test_micro_batches_in_any_order_add_up_to_the_same_gradient
  A loss that was divided by the counts of the step is divided by the number of micro-batches again:
    train/test_policy_loss.py::test_a_presets_step_is_the_same_in_micro_batches_of_any_size_and_order
    train/test_critic.py::test_a_critic_of_its_own_has_the_gradient_of_the_mean_value_loss_over_tokens
  A mask takes answers from the numerator and leaves them in the denominator:
    train/test_policy_loss.py::test_cut_answers_that_are_masked_leave_the_loss_and_its_counts_but_not_the_baseline
    train/test_policy_loss.py::test_answers_with_an_error_or_without_a_verdict_are_as_good_as_absent
  A step whose every answer is masked gives NaN:
    train/test_policy_loss.py::test_a_step_whose_every_answer_failed_has_loss_0_and_no_gradient
    recipes/test_reinforce.py::test_where_nothing_can_be_decided_nothing_is_learned_and_the_run_goes_on
  The constant of Dr. GRPO is the longest answer of the batch, or the number of its tokens:
    train/test_policy_loss.py::test_the_constant_of_dr_grpo_reads_no_length_of_the_batch
    objectives/test_policy.py::test_the_constant_aggregation_does_not_read_the_lengths
  Clip shares and KL are averaged over batches of unequal size:
    train/test_policy_metrics.py::test_means_are_over_the_tokens_of_all_updates_and_not_over_the_updates
    train/test_policy_metrics.py::test_the_kl_to_the_reference_is_a_mean_over_the_tokens_of_all_updates
  Entropy is the likelihood of what was sampled, or is divided twice:
    models/test_head.py::test_a_uniform_head_has_log_prob_and_entropy_of_log_v
    train/test_metrics.py::test_score_metrics_by_hand

Groups
  The rounding of equal rewards is divided by itself:
    objectives/test_advantage.py::test_equal_rewards_have_no_advantage_and_no_spread_whatever_eps_is
    train/test_policy_loss.py::test_groups_of_equal_rewards_have_a_gradient_of_exactly_0_but_for_a_kl_in_the_loss
    recipes/test_reinforce.py::test_where_all_rewards_are_equal_nothing_is_learned_and_a_refill_ends
  Dynamic sampling drops single answers of a group by a spread without themselves:
    train/test_collect.py::test_one_loser_among_winners_keeps_the_winners_too
  Dynamic sampling asks whether the mean lies between the bounds, and lets constant rewards pass:
    train/test_collect.py::test_a_group_is_judged_as_a_whole_by_equality_and_by_nothing_else
  Groups without an advantage are still pulled by the KL, and nobody said so:
    recipes/test_reinforce.py::test_groups_of_equal_rewards_are_still_pulled_to_a_reference_unless_they_are_dropped

Where an answer ends
  Padding has the id of the end token, and so the end is masked:
    core/test_packing.py::test_an_end_token_that_is_also_padding_is_learned
    tokens/test_chat.py::test_real_pad_equal_to_eos_still_ends_every_response_with_eos
  What follows the end counts as the answer, so that all are equally long:
    recipes/test_known_faults.py::test_an_answer_ends_at_its_first_end_token_and_answers_differ_in_length
    rollouts/test_engine.py::test_an_answer_is_over_when_its_ending_says_so
  Only one of several end tokens ends an answer:
    tokens/test_chat.py::test_stop_ids_are_eos_then_the_generation_config_s_then_the_end_of_turn
    recipes/test_known_faults.py::test_an_answer_ends_at_its_first_end_token_and_answers_differ_in_length
  The mask in attention is wrong after the end:
    models/test_packed.py::test_a_row_alone_and_packed_have_the_same_hidden_states
  Padding on the left moves the positions:
    models/test_packed.py::test_a_row_alone_and_packed_have_the_same_hidden_states
    recipes/test_known_faults.py::test_positions_that_are_learned_begin_anew_in_every_row
  Prompts or answers are padded on the wrong side:
    core/test_packing.py::test_a_pack_of_two_is_what_the_docstring_of_batch_says
  Rows of a pack see each other:
    models/test_packed.py::test_changing_one_row_leaves_the_others_bit_identical
  An answer that was cut off counts as one that ended:
    train/test_credit.py::test_an_answer_that_was_cut_off_goes_on_at_the_critics_value_where_that_is_asked_for

Log-probs
  They belong to the token before, or after:
    train/test_step.py::test_scores_come_back_in_the_order_of_their_rollouts
    train/test_policy_loss.py::test_a_presets_step_has_the_loss_and_gradient_of_the_loop
    recipes/test_dpo.py::test_an_answer_is_its_text_and_its_end_and_no_prompt_token_nor_bos
  Sampling has a temperature, scoring has none, or another distribution:
    recipes/test_reinforce.py::test_the_learner_scores_what_the_actor_sampled_after_every_step
    rollouts/test_sampling.py::test_log_probs_are_tempered_and_over_the_whole_vocabulary_even_when_truncated
    recipes/test_reinforce.py::test_choices_that_contradict_each_other_are_told_apart_with_a_cure
  The old policy is always the new one, and nothing is ever clipped:
    recipes/test_reinforce.py::test_nothing_is_clipped_at_the_first_update_and_something_later
    train/test_policy_loss.py::test_on_policy_every_ratio_is_one_and_the_gradient_that_of_reinforce
  The sampler keeps the weights of earlier steps:
    recipes/test_reinforce.py::test_the_learner_scores_what_the_actor_sampled_after_every_step
    rollouts/test_engine.py::test_a_stale_copy_of_the_weights_is_refused
  A sampler that computes otherwise is taken for the learner:
    train/test_policy_loss.py::test_an_actor_that_is_not_the_learner_is_corrected_for_as_in_the_loop
    train/test_health.py::test_the_log_prob_gap_warns_and_grows_critical_also_in_the_first_steps
  The importance weight of an answer is a sum of ratios:
    objectives/test_policy.py::test_a_sequences_importance_weight_is_the_product_of_its_tokens
  Old log-probs are cut into mini-batches in another order than their answers:
    recipes/test_reinforce.py::test_each_pass_learns_from_every_rollout_once_and_old_log_probs_stay_with_their_rollouts
  Text is tokenized again, and the tokens are not those that were sampled:
    recipes/test_known_faults.py::test_what_is_learned_are_the_tokens_that_were_sampled_and_not_those_of_their_text

Tokens that the policy did not write, and returns
  The return begins anew at them, and no reward reaches what stands before:
    train/test_credit.py::test_tokens_that_are_read_and_not_learned_are_as_good_as_taken_out
  Their KL is paid for:
    train/test_credit.py::test_tokens_that_are_read_and_not_learned_are_as_good_as_taken_out
  They are steps of the generalized advantage, or hold the reward:
    train/test_credit.py::test_tokens_that_are_read_and_not_learned_are_as_good_as_taken_out
    train/test_critic.py::test_values_of_tokens_that_are_not_learned_are_neither_asked_nor_trained
    objectives/test_value.py::test_an_answer_with_observations_taken_out_is_that_answer
  What a critic says after the end leaks in:
    train/test_credit.py::test_what_a_critic_says_after_the_end_of_an_answer_changes_nothing
    objectives/test_value.py::test_values_where_no_token_of_the_answer_is_change_nothing
  The reward stands at the first padding token:
    train/test_credit.py::test_the_reward_stands_at_the_last_learned_token_and_the_value_after_it_is_nothing
  The KL is in the reward and in the loss:
    train/test_credit.py::test_a_kl_in_the_loss_is_not_in_the_reward_too
    recipes/test_known_faults.py::test_a_kl_has_one_place

Pairs
  DPO takes a mean for a sum, or inverts its mask, or reads padding or the prompt:
    objectives/test_preference.py::test_dpo_of_two_pairs_by_hand
    recipes/test_dpo.py::test_two_pairs_by_hand
    recipes/test_dpo.py::test_an_answer_is_its_text_and_its_end_and_no_prompt_token_nor_bos
  A reward model is read at the wrong token:
    recipes/test_rm.py::test_the_score_is_read_at_the_token_that_ends_the_answer_although_it_is_the_padding_token
    models/test_scalar.py::test_a_padded_stock_batch_reads_the_last_real_token_also_where_pad_was_eos

Rewards
  Where the gold answer cannot be read, everything is right:
    rewards/test_verify.py::test_a_gold_answer_that_cannot_be_read_decides_nothing
    rewards/test_answer.py::test_a_gold_answer_that_cannot_be_read_decides_nothing
    train/test_credit.py::test_a_lone_verdict_of_a_group_has_no_baseline_and_leaves_the_step
  An expression with powers is evaluated, and never ends:
    rewards/test_arithmetic.py::test_hostile_texts_take_no_time
    rewards/test_arithmetic.py::test_nothing_else_has_a_value
  A time limit by signals fails outside of the main thread:
    rewards/test_workers.py::test_a_worker_that_hangs_is_killed_within_its_time_and_the_others_go_on
    rewards/test_workers.py::test_threads_may_share_the_workers
  A length reward rises again beyond its longest answer, or counts characters:
    rewards/test_shaping.py::test_cosine_is_monotone_in_tokens_and_flat_past_the_longest
    rewards/test_shaping.py::test_cosine_counts_tokens_and_no_characters

Cost
  Gradient checkpointing switches the cache of keys and values off while sampling:
    recipes/test_known_faults.py::test_gradient_checkpointing_costs_sampling_nothing
"""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.recipes import faults, tiny
from tests.train.tiny import EOS, VOCAB, rollout
from tinyr2.models.decode import Decoder
from tinyr2.rollouts.engine import decode_all
from tinyr2.rollouts.request import Request
from tinyr2.rollouts.sampling import SamplingConfig
from tinyr2.train.credit import KlConfig
from tinyr2.train.step import Learner, score


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return tiny.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("file, name", faults.guards_of(__doc__))
def test_the_test_that_guards_a_fault_exists(file, name):
    faults.assert_exists(file, name)


def test_every_fault_names_its_guards():
    faults.assert_listed(__doc__, 40)


def test_an_answer_ends_at_its_first_end_token_and_answers_differ_in_length(world):
    model = AutoModelForCausalLM.from_pretrained(world / "student")
    ends, requests = (3, 4, 5), [Request((6, 7, 8), seed=i, max_new=20) for i in range(64)]
    answers = decode_all(model, requests, SamplingConfig(), stop=ends)
    for a in answers:
        last = a.response_ids[-1] in ends
        assert not set(a.response_ids[:-1]) & set(ends)
        assert (a.finish == "stop") == last and len(a.logp) == len(a.response_ids)
    assert len({len(a.response_ids) for a in answers}) > 5
    assert {a.response_ids[-1] for a in answers if a.finish == "stop"} == set(ends)


@pytest.mark.filterwarnings("ignore:.*runs padded")
def test_positions_that_are_learned_begin_anew_in_every_row():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2,
                                       bos_token_id=None, eos_token_id=EOS)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)  # a position that is one off would be seen
    rows = [rollout((3, 4, 5), (6, 7, EOS)), rollout((9,), (10, 11, 12, 13, EOS)), rollout((15, 16, 17, 18, 19), (4,))]
    found = score(Learner(model=model, vocab=VOCAB, tokens_per_micro_batch=1000), rows)
    for r, said in zip(rows, found, strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0].log_softmax(-1)
        expected = [float(logp[len(r.prompt_ids) - 1 + t, token]) for t, token in enumerate(r.response_ids)]
        assert said == pytest.approx(expected, abs=1e-5)


def test_what_is_learned_are_the_tokens_that_were_sampled_and_not_those_of_their_text(world, tmp_path):
    outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / "run", "algorithm=dr_grpo",
                                    "rollout.num_generations=8"))
    tokenizer, changed = AutoTokenizer.from_pretrained(world / "student"), 0
    for result in outcome.steps:
        for r in result.rollouts:
            changed += tuple(tokenizer(r.text, add_special_tokens=False)["input_ids"]) != r.response_ids
            assert len(r.actor_logp) == len(r.response_ids) == len(r.credit)
    assert changed > 10  # so that tokenizing anew would be seen
    assert max(outcome.column("sampling/sampling_logp_difference/max")) < 1e-5


def test_a_kl_has_one_place():
    with pytest.raises(ValidationError):
        KlConfig(place=["loss", "token_reward"], beta=0.1)


def test_gradient_checkpointing_costs_sampling_nothing(world, tmp_path, monkeypatch):
    calls, step = [], Decoder.step

    def counted(self, cache, tokens):
        calls.append(len(tokens))
        return step(self, cache, tokens)

    monkeypatch.setattr(Decoder, "step", counted)
    spent = []
    for checkpointing in ("false", "true"):
        calls.clear()
        outcome = tiny.go(tiny.settings("reinforce", world, tmp_path / checkpointing, "algorithm=dr_grpo",
                                        f"train.gradient_checkpointing={checkpointing}", "train.max_steps=1"))
        spent.append(calls[:])
        lengths = [len(r.response_ids) for r in outcome.steps[0].rollouts]
        assert sum(calls) == sum(lengths) - len(lengths)  # a token of each row a call; the first is the prompt's
    assert spent[0] == spent[1]
