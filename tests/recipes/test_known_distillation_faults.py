"""Faults that implementations of distillation are known to have had, each with the tests that would find it here.

In brackets: where the public can read of it.

What is minimized
  Minus the mean reward of the best candidates is the loss, and no parameter has a gradient:
    objectives/test_enumeration.py::test_minus_the_mean_reward_of_the_best_candidate_has_no_gradient_in_the_students_parameters
    objectives/test_enumeration.py::test_reward_weighted_likelihood_has_the_exact_gradient_of_the_expected_reward
  The log-ratio of a sampled token is itself the loss, and its expected gradient is zero (refused by verl's losses.py):
    objectives/test_enumeration.py::test_the_plain_log_ratio_as_a_loss_has_expected_gradient_zero
    objectives/test_enumeration.py::test_sampled_reverse_kl_has_the_exact_gradient_of_the_kl_of_a_token
    train/test_loss.py::test_the_sampled_estimator_refuses_what_it_does_not_estimate
  A KL over the likeliest tokens is a reward, which no action changes, and its gradient is zero (radixark/miles#2352):
    models/test_topk.py::test_values_and_gradients_are_those_of_the_buckets_whatever_the_chunk
    train/test_loss.py::test_of_a_sequences_loss_the_reward_is_weighted_and_the_divergence_is_not
  A KL over the likeliest tokens falls below zero, and clamping it ends the gradient (verl-project/verl#7855, #7856):
    models/test_topk_lists.py::test_without_a_tail_the_divergence_is_never_negative_and_the_plain_sum_is
    models/test_topk_lists.py::test_without_a_tail_values_and_gradients_are_those_of_the_corrected_kl
  What lies outside the likeliest tokens costs the student nothing, so it flees there (verl-project/verl#7856):
    models/test_topk.py::test_a_student_that_is_sure_of_the_listed_tokens_has_a_small_tail_and_not_a_rounded_one
    teachers/test_marginal.py::test_a_student_that_flees_to_tokens_without_a_counterpart_is_called_back
    recipes/test_distill_served.py::test_a_list_of_the_whole_vocabulary_is_the_whole_distribution
  Advantages are whitened with the teacher's term in them, which rescales and shifts it (THUDM/slime, loss.py):
    recipes/test_distill.py::test_advantages_are_centered_over_the_others_of_one_author_and_one_problem
    train/test_step.py::test_loss_and_gradient_equal_a_loop_over_tokens

What is counted
  Padding is in the loss, because a mask looks for -100 in ids that never have it (TRL, minillm_trainer.py):
    core/test_packing.py::test_a_pack_of_two_is_what_the_docstring_of_batch_says
    train/test_step.py::test_changing_a_masked_token_after_the_learned_ones_changes_nothing
    teachers/test_local.py::test_masked_tokens_are_not_judged
  Tokens of the answer are missing from the loss (huggingface/trl#4719, #6006):
    recipes/test_distill.py::test_the_first_loss_is_what_a_naive_reading_of_the_rollouts_gives
    teachers/test_local.py::test_its_judge_speaks_of_every_token_with_weight_1
  The loss is a mean of the means of micro-batches (modelscope/ms-swift#10076):
    train/test_step.py::test_micro_batches_in_any_order_add_up_to_the_same_gradient
    train/test_step_panel.py::test_however_the_step_is_split_the_gradient_is_the_same
    models/test_head.py::test_micro_batches_in_any_order_add_up_to_the_whole
  A log-prob that nobody measured is 0, which is certainty (allenai/open-instruct#1847):
    core/test_packing.py::test_what_a_rollout_lacks_is_nan_and_never_zero
    objectives/test_spans.py::test_an_unknown_log_prob_gives_no_credit_and_is_counted
    teachers/test_member.py::test_what_a_server_does_not_say_makes_its_span_unknown_and_no_other
  The end of an answer is masked, where padding has its id (huggingface/trl#6357):
    recipes/test_distill.py::test_the_end_of_an_answer_is_judged_where_padding_is_the_same_token
    tokens/test_translate.py::test_padding_that_is_the_end_changes_nothing
  A NaN or -inf of one token is the loss of all (huggingface/trl#5594, microsoft/LMOps#38):
    train/test_step_spoken.py::test_a_log_prob_that_is_no_number_never_reaches_the_loss_and_is_counted
    teachers/test_remote.py::test_a_log_prob_that_is_not_finite_is_left_out_and_counted
    models/test_topk_lists.py::test_entries_of_minus_infinity_are_absent_whatever_their_ids
    models/test_head.py::test_logits_of_plus_and_minus_80_stay_finite_and_right

Vocabularies
  Models of one tokenizer, padded to different sizes, cannot be compared (huggingface/trl#2215, microsoft/LMOps#286):
    recipes/test_distill.py::test_a_longer_vocabulary_is_cropped_to_the_ids_that_both_have
    recipes/test_distill_refused.py::test_a_vocabulary_that_differs_by_padding_alone_is_allowed_and_named
    models/test_head.py::test_a_cropped_vocabulary_normalizes_over_the_kept_tokens_and_pads_the_gradient
    teachers/test_minds_listing.py::test_rows_are_padded_with_absent_entries_and_tokens_without_a_row_are_left_out
  Logits of all tokens over the whole vocabulary are held at once (modelscope/ms-swift#7295, huggingface/trl#3678):
    models/test_head_cost.py::test_no_tensor_over_the_vocabulary_is_larger_than_a_chunk
    models/test_pairs.py::test_no_tensor_of_either_vocabulary_is_larger_than_a_chunk
    models/test_topk.py::test_memory_beyond_the_students_own_chunk_grows_with_the_list_and_not_with_the_vocabulary
  The student's ids go to a teacher to whom they mean other tokens, and nothing says so (TRL's asynchronous trainer):
    recipes/test_doctor.py::test_a_teacher_with_another_tokenizer_is_a_fault_where_nothing_translates
    recipes/test_distill_refused.py::test_a_server_with_another_tokenizer_is_told_before_anything_is_written
    teachers/test_remote_check.py::test_a_vocabulary_that_differs_in_its_merges_alone_is_found_by_their_text
  Shared tokens are found by raw string, and "▁the" is not "Ġthe" (TRL's GOLD; tokenkit, byteification.md):
    tokens/test_translate.py::test_pairs_are_the_ids_of_the_same_bytes_and_roles
    tokens/test_lineup.py::test_the_mapped_vocabulary_is_counted_against_either_side
  A table of the letters that stand for bytes is wrong in a few (NeMo-RL: tab becomes newline):
    tokens/test_spelling.py::test_the_letter_of_a_byte_is_read_as_that_byte
    tokens/test_spelling.py::test_any_bytes_round_trip

Another tokenizer
  Distributions are those of the position after the one that predicts the token (huggingface/trl#5152):
    teachers/test_local.py::test_the_states_are_those_that_predict_the_learned_tokens
    teachers/test_member.py::test_mapped_compares_whole_distributions_one_to_one_and_speaks_of_the_rest
    train/test_step_spoken.py::test_twelve_tokens_are_credited_with_the_numbers_written_here
  A distribution over a merged group is none that either model has (huggingface/trl#5905):
    teachers/test_marginal.py::test_it_is_what_enumeration_of_the_teachers_next_tokens_gives
    teachers/test_marginal.py::test_tokenizers_of_all_kinds_agree_with_enumeration
  Ids are decoded one by one, and a character of several tokens is lost (huggingface/trl#4393):
    tokens/test_translate.py::test_a_character_that_the_student_has_cut_is_read_by_its_bytes
    tokens/test_translate.py::test_any_text_is_tiled_on_both_sides
    tokens/test_spelling.py::test_ids_read_as_they_are_decoded
  Only byte-level tokenizers can be aligned, no SentencePiece and no spelled-out byte (TRL's GOLD):
    tokens/test_spelling.py::test_a_character_that_no_token_holds_falls_back_to_its_bytes
    tokens/test_translate.py::test_special_tokens_spelled_as_text_stay_text
  Spaces are stripped before tokens are compared, so " the" is "the" (SimCT):
    teachers/test_marginal.py::test_a_first_token_whose_space_is_no_text_is_not_taken_for_one_with_a_space
    tokens/test_lineup.py::test_a_first_token_without_its_space_is_exact_but_not_mapped
    tokens/test_translate.py::test_a_first_space_is_the_template_s_matter
  Texts are normalized before they are compared, and the lengths of bytes are those of another text (DPCA):
    tokens/test_exact.py::test_what_is_not_the_text_s_bytes_is_lost
    tokens/test_spelling.py::test_what_a_normalizer_changes_is_lost_and_the_rest_is_exact
  A teacher's log-prob is dealt out equally to the tokens that it overlaps (rllm), or averaged over a span (SimCT):
    teachers/test_member.py::test_chunk_gives_each_span_the_sum_of_the_teachers_tokens
    train/test_step_spoken.py::test_every_token_of_a_span_carries_the_whole_log_ratio
    objectives/test_spans.py::test_the_expected_gradient_is_that_of_the_reverse_kl_of_each_span
  Tokens that are not cut alike have no signal, so the answer's log-ratio is not kept (THUDM/slime#2032):
    train/test_step_spoken.py::test_the_spans_of_an_answer_add_up_to_its_log_ratio
    tokens/test_align.py::test_spans_are_the_smallest_that_there_are
  Numbers that one side writes as one token have no signal, and arithmetic is unlearned (arXiv 2605.21699):
    tokens/test_translate.py::test_numbers_that_one_side_writes_as_one_token_are_in_spans_on_both
    teachers/test_marginal.py::test_it_is_what_enumeration_of_the_teachers_next_tokens_gives
  The cut of a token says what cannot follow it, and that bias is taken for the teacher's opinion (arXiv 2503.20083):
    teachers/test_member.py::test_debiased_chunks_close_where_little_probability_is_ruled_out
    train/test_step_spoken.py::test_the_student_itself_across_the_translation_gives_no_signal_and_no_gradient
    teachers/test_marginal.py::test_a_student_that_is_the_teacher_with_special_and_padded_tokens_is_not_pulled
  What was sampled is taken for what the tokenizer would have written:
    tokens/test_translate.py::test_only_the_bytes_of_another_way_to_cut_count
    teachers/test_marginal.py::test_where_the_student_cut_as_its_tokenizer_does_not_nothing_is_known_until_the_teachers_token_ends

Templates and ends
  The teacher reads a chat in the student's template, and nothing says so (thinking-machines-lab/tinker-cookbook#796):
    teachers/test_views.py::test_another_tokenizer_reads_its_own_template_and_tokens
    teachers/test_views.py::test_a_template_of_its_own_with_one_vocabulary_changes_the_prompt_alone
    recipes/test_doctor.py::test_a_teacher_that_would_read_prompts_in_another_form_is_a_warning
  One side alone has a BOS, and all that follows is shifted (huggingface/trl#5885):
    tokens/test_translate.py::test_a_bos_that_one_template_writes_stays_in_its_prompt
    tokens/test_chat.py::test_bos_stands_once_though_template_and_tokenizer_both_would_write_it
  Special tokens inside an answer are compared as text:
    tokens/test_translate.py::test_other_special_tokens_are_counted_and_their_neighbors_aligned
    tokens/test_translate.py::test_thoughts_are_mapped_by_role
    tokens/test_spelling.py::test_special_tokens_and_ids_without_a_token_have_no_bytes
  The end is skipped, or is another token for the teacher, and answers never end (modelscope/ms-swift#9526):
    tokens/test_translate.py::test_the_end_of_an_answer_pairs_with_the_teacher_s_and_a_cut_answer_has_none
    teachers/test_marginal.py::test_an_end_of_turn_is_asked_for_by_its_role
    recipes/test_check_staff.py::test_a_teacher_without_an_end_would_teach_never_to_stop
    train/test_health.py::test_length_that_doubles_within_50_steps_warns
  What is too long for the teacher is cut, in front or behind, and judged all the same (TRL, gold_trainer.py):
    teachers/test_views.py::test_what_is_too_long_for_the_teacher_is_no_paper_and_never_cut
    recipes/test_distill_served.py::test_an_answer_that_the_server_refuses_has_no_opinion_and_is_counted
    recipes/test_data_distillation.py::test_what_the_student_cannot_read_whole_is_dropped_and_counted_and_never_cut

Servers
  Log-probs of a prompt know no temperature, and the student's do (THUDM/slime#2319, verl-project/verl#5592):
    teachers/test_remote_check.py::test_a_temperature_that_the_engine_cannot_give_is_refused
    recipes/test_distill_refused.py::test_choices_that_contradict_each_other_are_told_apart_with_a_cure
    recipes/test_distill.py::test_sampling_and_scoring_share_the_temperature
  A server is asked answer by answer, and for log-probs that nobody reads (sgl-project/sglang#27421):
    teachers/test_remote.py::test_a_server_is_asked_to_write_next_to_nothing_and_to_say_no_more_than_is_read
    recipes/test_distill_served.py::test_all_answers_of_a_step_are_asked_at_once_and_each_once

Several teachers, and those who know more
  A teacher is lost because of its name: verl drops one called teacher_model where there are several:
    train/test_step_panel.py::test_no_teacher_is_lost_whatever_it_is_called
    recipes/test_check_staff.py::test_a_name_may_be_what_a_file_is_called
  What the teacher is shown stands in the student's prompt too, or is the answer that it judges:
    teachers/test_privileged.py::test_the_students_prompt_is_the_same_whatever_the_teacher_is_shown
    teachers/test_privileged.py::test_a_rollout_never_sees_itself_nor_its_own_text_as_a_success
    recipes/test_distill_teachers.py::test_who_is_taught_by_its_own_weights_of_now_learns_from_the_privilege_alone
  A student that teaches itself unlearns while its loss falls, and the run goes on:
    recipes/test_guard.py::test_without_a_guard_the_loss_falls_and_the_student_unlearns
    recipes/test_guard.py::test_the_guard_that_stands_by_itself_halts_the_run_and_the_best_model_is_kept
"""

import pytest

from tests.recipes import faults


@pytest.mark.parametrize("file, name", faults.guards_of(__doc__))
def test_the_test_that_guards_a_fault_exists(file, name):
    faults.assert_exists(file, name)


def test_every_fault_names_its_guards():
    faults.assert_listed(__doc__, 38)
