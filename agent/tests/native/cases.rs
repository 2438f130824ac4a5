// SPDX-License-Identifier: Apache-2.0
//! The cases.

mod common_pids;
mod confinement;
mod control;
mod exec;
mod filesystem;
mod notify;
mod program;
mod sockets;
mod stdio;

use std::future::Future;
use std::pin::Pin;

/// A case: what it is called, and how it is run.
type Case = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

macro_rules! cases {
    ($($module:ident::$name:ident),* $(,)?) => {
        /// All cases.
        pub(crate) const CASES: &[Case] =
            &[$((concat!(stringify!($module), "::", stringify!($name)), || Box::pin($module::$name()))),*];
    };
}

cases![
    common_pids::containers_see_each_other_and_end_alone,
    common_pids::first_process_shows_nothing_of_the_agent,
    control::paused_container_stands_still_until_it_is_resumed,
    control::exec_in_a_paused_container_waits_without_holding_up_the_rest,
    control::paused_container_can_be_killed_and_deleted,
    control::update_changes_settings_and_names_those_refused,
    control::refused_update_leaves_quota_and_memory,
    control::statistics_tell_what_was_used,
    control::oom_kills_are_told_as_they_happen_and_the_end_is,
    control::oom_wait_ends_with_the_container_where_nothing_is_counted,
    control::list_shows_the_tree_of_processes,
    exec::exit_codes_are_kept_until_they_are_deleted,
    exec::exec_is_in_the_containers_namespaces_and_cgroup,
    exec::exec_has_its_own_attributes,
    exec::programs_and_folders_that_are_missing_are_told,
    exec::created_container_takes_execs,
    exec::unknown_names_and_states_are_told,
    exec::a_megabyte_goes_in_and_out,
    exec::exec_has_a_terminal_of_its_own,
    exec::signals_reach_an_execd_process_alone,
    exec::inits_end_is_the_execd_processes_too_and_their_output_comes,
    exec::wait_does_not_wait_for_what_was_left_behind,
    exec::wait_ends_though_what_was_left_behind_writes_on,
    exec::many_execs_leave_nothing,
    exec::execs_run_beside_each_other,
    confinement::seccomp_filter_holds,
    confinement::bad_seccomp_filter_is_refused,
    confinement::scheduling_is_the_specs,
    confinement::clocks_have_the_specs_offsets,
    confinement::container_that_is_deleted_while_it_is_made_does_not_come,
    confinement::start_hooks_run_in_the_container_before_its_program,
    filesystem::only_the_containers_mounts_are_there,
    filesystem::default_devices_work,
    filesystem::devices_of_the_spec_are_made,
    filesystem::devices_are_bound_where_files_are_in_the_way,
    filesystem::tmpfs_has_its_options,
    filesystem::tmpfs_takes_up_what_it_covers,
    filesystem::unknown_types_and_bad_options_are_told,
    filesystem::mqueue_and_cgroup_are_mounted,
    filesystem::binds_show_the_trees_content,
    filesystem::readonly_binds_cannot_be_written,
    filesystem::bind_of_a_missing_source_is_told,
    filesystem::destinations_through_links_stay_in_the_rootfs,
    filesystem::readonly_rootfs_cannot_be_written,
    filesystem::readonly_tree_need_not_have_the_places_of_mounts,
    filesystem::masked_paths_are_empty_and_readonly_paths_readonly,
    filesystem::sysctls_are_set_in_the_namespace,
    filesystem::loopback_is_up_and_alone,
    filesystem::cgroup_settings_hold_and_refused_ones_are_told,
    filesystem::memory_limit_kills_and_is_told,
    program::echo,
    program::exit_codes,
    program::signals_reach_the_first_process,
    program::signals_reach_all_processes,
    program::signal_of_a_child_is_128_and_its_number,
    program::unknown_container_is_said,
    program::background_processes_end_with_the_first,
    program::orphans_are_reaped_in_the_container,
    program::first_process_is_pid_1_and_alone,
    program::environment_is_the_specs_with_a_home,
    program::working_directory_is_entered_or_made,
    program::working_directory_that_is_a_file_is_refused,
    program::user_groups_and_umask_are_set,
    program::capabilities_are_exactly_the_specs,
    program::limits_are_set,
    program::no_new_privileges_and_oom_score_are_set,
    program::signals_have_their_default_actions,
    program::no_descriptor_of_the_agents_is_left,
    program::names_are_set_in_the_containers_own_namespace,
    program::missing_programs_are_told,
    program::programs_that_cannot_be_executed_are_told,
    program::scripts_run_and_missing_interpreters_are_told,
    program::created_container_waits_to_be_started,
    program::containers_are_deleted_in_any_state,
    program::several_containers_run_at_once,
    notify::readiness_is_told_whenever_it_is_asked_for,
    notify::end_without_readiness_is_told,
    sockets::connections_are_told_and_joined_with_the_hosts_streams,
    sockets::connections_to_all_sockets_have_their_turn,
    sockets::socket_is_owned_as_the_hosts,
    sockets::what_was_sent_last_is_told_after_the_containers_end,
    sockets::stream_that_the_host_closes_at_once_closes_the_connection,
    stdio::input_reaches_output_and_ends,
    stdio::preserved_descriptors_are_three_and_on,
    stdio::too_many_or_wrong_descriptors_are_refused,
    stdio::absent_streams_are_dev_null,
    stdio::reader_that_goes_away_ends_the_writer,
    stdio::end_is_told_before_the_output_is_read,
    stdio::process_that_does_not_read_ends_all_the_same,
    stdio::users_can_open_their_streams_by_name,
    stdio::streams_may_come_late,
    stdio::terminal_is_a_terminal_of_the_right_size,
    stdio::terminal_is_resized_and_the_process_told,
    stdio::keys_reach_the_process_as_input_and_as_signals,
    stdio::end_of_input_leaves_the_terminal_alone,
    stdio::waiting_container_does_not_hold_others_pipes,
];
