// SPDX-License-Identifier: Apache-2.0
//! Block devices of the host, as `--device` of engines and raw block volumes of Kubernetes hand them to a container.

use serde_json::{Value, json};

use super::user_namespace;
use super::{Case, case};
use crate::bundle::Bundle;
use crate::cri::api::Device;
use crate::detached::Detached;
use crate::engines::{Kubelet, Pod, Podman};
use crate::env::{Env, Kind};
use crate::failure::{Result, ensure, ensure_eq, fail};
use crate::loop_device::LoopDevice;

pub(super) const CASES: &[Case] = &[
    case!(both_sides_see_what_is_written),
    case!(what_reaches_the_device_itself),
    case!(read_only_by_its_rules),
    case!(read_only_on_the_host),
    case!(rules_name_the_hosts_devices),
    case!(rules_are_changed),
    case!(device_of_a_user_namespace),
    case!(file_system_of_a_device),
    case!(as_many_as_there_can_be),
    case!(podman_device),
    case!(volumes_of_a_pod).limit(600),
    case!(volumes_beyond_a_pods_room),
];

const MIB: u64 = 1 << 20;

/// A bundle whose only devices are these, each used as its rules allow.
fn bundle(env: &Env, devices: &[Value], rules: &[Value]) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.set("/linux/devices", json!(devices)).set("/linux/resources", json!({ "devices": rules }));
    Ok(bundle)
}

/// A script that writes a text at a block of 512 bytes.
fn put(text: &str, block: u64, device: &str) -> String {
    format!("printf '{text}' | dd of={device} bs=512 seek={block} conv=notrunc 2>/dev/null")
}

/// One that prints some bytes of a block.
fn get(length: usize, block: u64, device: &str) -> String {
    format!("dd if={device} bs=512 skip={block} count=1 2>/dev/null | head -c {length}")
}

fn both_sides_see_what_is_written(env: &Env) -> Result {
    let device = LoopDevice::new(env, 8 * MIB)?;
    device.write(4 * 512, b"from the host")?;
    let node = json!({
        "path": "/dev/deep/xvda", "type": "b", "major": device.major, "minor": device.minor, "fileMode": 0o640,
        "uid": 7, "gid": 8,
    });
    let mut bundle = bundle(env, &[node], &[device.rule(true, "rwm")])?;
    let name = "/dev/deep/xvda";
    let scripts = [
        format!("stat -c '%F %a %u:%g' {name}; blockdev --getsize64 {name}"),
        get(13, 4, name),
        // Without a word of syncing: the end of the container is enough.
        put("from a guest", 16383, name),
    ];
    bundle.sh(&scripts.join("; "));

    env.run(&bundle)?.output()?.expect_stdout("block special file 640 7:8\n8388608\nfrom the host")?;

    ensure_eq!(device.read(16383 * 512, 12)?, b"from a guest", "what is on the host");
    // While the container lives, after a sync.
    bundle.sh(&format!("{}; sync; echo written; read line; {}", put("again", 0, name), get(4, 1000, name)));
    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("written\n")?;
    ensure_eq!(device.read(0, 5)?, b"again", "what is on the host after a sync");
    device.write(1000 * 512, b"told")?;
    running.write(b"\n")?;
    running.finish()?.expect_stdout("written\ntold")?;
    device.end()
}

fn what_reaches_the_device_itself(env: &Env) -> Result {
    let device = LoopDevice::new(env, MIB)?;
    device.write(0, &[b'x'; 16384])?;
    let mut bundle = bundle(env, &[device.at("/dev/xvda")], &[device.rule(true, "rwm")])?;
    let before = device.flushes()?;
    bundle.sh("printf sync | dd of=/dev/xvda bs=512 conv=notrunc,fsync 2>/dev/null; \
         blkdiscard -o 4096 -l 4096 /dev/xvda && echo discarded; echo done; read line");

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("discarded\ndone\n")?;

    ensure!(device.flushes()? > before, "an fsync in the container has not flushed the device");
    ensure_eq!(device.read(4090, 12)?, b"xxxxxx\0\0\0\0\0\0", "around the beginning of what is discarded");
    ensure_eq!(device.read(8186, 12)?, b"\0\0\0\0\0\0xxxxxx", "around its end");
    running.write(b"\n")?;
    running.finish()?.expect_code(0)?;
    device.end()
}

fn read_only_by_its_rules(env: &Env) -> Result {
    let device = LoopDevice::new(env, MIB)?;
    device.write(0, b"kept")?;
    let mut bundle = bundle(env, &[device.at("/dev/xvda")], &[device.rule(true, "r")])?;
    let script = format!("{}; (: >>/dev/xvda) 2>&1; blockdev --getro /dev/xvda", get(4, 0, "/dev/xvda"));
    bundle.sh(&script);

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    // The whole disk is, where it is the container's alone.
    let read_only = if env.kind == Kind::Bulkhead { 1 } else { 0 };
    let expected = format!("keptsh: can't create /dev/xvda: Operation not permitted\n{read_only}\n");
    ensure_eq!(output.stdout(), expected, "stdout");
    device.end()
}

fn read_only_on_the_host(env: &Env) -> Result {
    let device = LoopDevice::read_only(env, MIB)?;
    let mut bundle = bundle(env, &[device.at("/dev/xvda")], &[device.rule(true, "rwm")])?;
    bundle.sh(&format!("blockdev --getro /dev/xvda; {} || echo refused", put("x", 0, "/dev/xvda")));

    env.run(&bundle)?.output()?.expect_stdout("1\nrefused\n")?;

    ensure_eq!(device.read(0, 1)?, b"\0", "what is on the host");
    device.end()
}

/// The guest's kernel has other numbers for them, which mean nothing in rules.
fn rules_name_the_hosts_devices(env: &Env) -> Result {
    let (first, second) = (LoopDevice::new(env, MIB)?, LoopDevice::new(env, 2 * MIB)?);
    let devices = [second.at("/dev/xvda"), first.at("/dev/xvdb"), second.at("/dev/again")];
    // Major numbers of virtio's block devices in a guest.
    let guests = (250..256).map(|major| json!({ "allow": true, "type": "b", "major": major, "access": "rwm" }));
    let rules: Vec<Value> = guests.chain([second.rule(true, "rw")]).collect();
    let mut bundle = bundle(env, &devices, &rules)?;
    bundle.sh("for name in xvda again xvdb; do blockdev --getsize64 /dev/$name 2>&1; done; true");

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    let text = output.stdout();
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 3 && lines[..2] == ["2097152"; 2], "the sizes: {text}");
    ensure!(lines[2].contains("not permitted"), "a device that no rule allows: {text}");
    first.end()?;
    second.end()
}

fn rules_are_changed(env: &Env) -> Result {
    env.only_bulkhead()?;
    let device = LoopDevice::new(env, MIB)?;
    let mut bundle = bundle(env, &[device.at("/dev/xvda")], &[device.rule(true, "rw")])?;
    bundle.sh("echo started; sleep 1000");
    let container = Detached::run(env, &bundle)?;
    container.wait_for("started")?;
    let write = "(: >>/dev/xvda) && echo written";
    container.exec(write).output()?.expect_stdout("written\n")?;

    let resources = json!({ "devices": [device.rule(true, "r")] }).to_string();
    container.verb(&["update", "--resources", "-"]).input(resources).output()?.expect_code(0)?;

    let refused = container.exec(write).output()?;
    ensure!(refused.stderr().contains("Operation not permitted"), "after the change: {}", refused.describe());
    container.exec("(: </dev/xvda) && echo read").output()?.expect_stdout("read\n")?;
    container.must(&["delete", "--force"])?;
    device.end()
}

fn device_of_a_user_namespace(env: &Env) -> Result {
    env.only_bulkhead()?;
    let device = LoopDevice::new(env, MIB)?;
    let mut bundle = user_namespace::bundle(env)?;
    bundle.set("/linux/devices", json!([device.at("/dev/xvda")]));
    bundle.set("/linux/resources", json!({ "devices": [device.rule(true, "rw")] }));
    bundle.sh(&format!("stat -c '%F %a %u:%g' /dev/xvda /dev/null; {}", put("mapped", 0, "/dev/xvda")));

    let nodes = "block special file 660 0:0\ncharacter special file 666 0:0\n";
    env.run(&bundle)?.output()?.expect_stdout(nodes)?;

    ensure_eq!(device.read(0, 6)?, b"mapped", "what is on the host");
    device.end()
}

/// A container that may mount can mount it, by the guest's kernel.
fn file_system_of_a_device(env: &Env) -> Result {
    env.only_bulkhead()?;
    let device = LoopDevice::new(env, 16 * MIB)?;
    let path = device.path.display().to_string();
    env.tool("mkfs.ext4".as_ref(), ["-q", &path]).output()?.expect_code(0)?;
    let mut bundle = bundle(env, &[device.at("/dev/xvda")], &[device.rule(true, "rw")])?;
    let mut capabilities = bundle.spec["process"]["capabilities"]["bounding"].clone();
    if let Some(list) = capabilities.as_array_mut() {
        list.push(json!("CAP_SYS_ADMIN"));
    }
    for set in ["bounding", "effective", "permitted"] {
        bundle.set(&format!("/process/capabilities/{set}"), capabilities.clone());
    }
    bundle.sh("mount -t ext4 /dev/xvda /tmp && echo kept >/tmp/file && umount /tmp");

    env.run(&bundle)?.output()?.expect_stdout("")?;

    let read = env.tool("debugfs".as_ref(), ["-R", "cat /file", &path]).output()?;
    ensure_eq!(read.stdout(), "kept\n", "the file on the host");
    device.end()
}

fn as_many_as_there_can_be(env: &Env) -> Result {
    env.only_bulkhead()?;
    let devices = (1..=8).map(|count| LoopDevice::new(env, count * MIB)).collect::<Result<Vec<_>>>()?;
    let nodes: Vec<Value> = devices.iter().zip(1..).map(|(device, n)| device.at(&format!("/dev/xvd{n}"))).collect();
    let rules: Vec<Value> = devices.iter().map(|device| device.rule(true, "rw")).collect();
    let mut seven = bundle(env, &nodes[..7], &rules)?;
    seven.sh("for n in 1 2 3 4 5 6 7; do echo $(($(blockdev --getsize64 /dev/xvd$n) / 1048576)); done");

    env.run(&seven)?.output()?.expect_stdout("1\n2\n3\n4\n5\n6\n7\n")?;

    seven.set("/linux/devices", json!(nodes));
    let refused = env.run(&seven)?.output()?;
    refused.expect_error(&["linux.devices[7]", "more than 7 block devices of the host"])?;
    devices.into_iter().try_for_each(LoopDevice::end)
}

fn podman_device(env: &Env) -> Result {
    let device = LoopDevice::new(env, MIB)?;
    device.write(0, b"podman")?;
    let podman = Podman::new(env)?;
    let path = device.path.display();
    let script = format!("{}; {}", get(6, 0, "/dev/xvda"), put("written", 2, "/dev/xvda"));

    let option = format!("{path}:/dev/xvda");
    podman.run(&["--device", &option], &["sh", "-c", &script]).output()?.expect_stdout("podman")?;

    ensure_eq!(device.read(1024, 7)?, b"written", "what is on the host");
    let option = format!("{path}:/dev/xvda:r");
    let script = "(: >>/dev/xvda) 2>/dev/null || echo refused";
    podman.run(&["--device", &option], &["sh", "-c", script]).output()?.expect_stdout("refused\n")?;
    drop(podman);
    device.end()
}

/// What a container does that waits to be ended.
const WAIT: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";

/// Starts a container with these volumes, which the kubelet hands to CRI as devices.
fn start(pod: &Pod<'_>, name: &str, volumes: &[(&LoopDevice, &str)]) -> Result<String> {
    let mut config = pod.config(name, WAIT);
    config.devices = volumes
        .iter()
        .map(|(device, container_path)| Device {
            container_path: (*container_path).to_owned(),
            host_path: device.path.display().to_string(),
            permissions: "rwm".to_owned(),
            ..Device::default()
        })
        .collect();
    pod.start(config)
}

fn volumes_of_a_pod(env: &Env) -> Result {
    let (common, own) = (LoopDevice::new(env, 2 * MIB)?, LoopDevice::new(env, 3 * MIB)?);
    common.write(0, b"from the host")?;
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("volumes")?;
    let none = pod.script("none", WAIT)?;

    let first = start(&pod, "first", &[(&common, "/dev/xvda")])?;
    ensure_eq!(pod.output(&first, "blockdev --getsize64 /dev/xvda")?, "2097152\n", "the size");
    ensure_eq!(pod.output(&first, &get(13, 0, "/dev/xvda"))?, "from the host", "what the host has written");
    // Two containers with one device see the same, also before it is on the host.
    let second = start(&pod, "second", &[(&common, "/dev/shared"), (&own, "/dev/own")])?;
    pod.output(&first, &put("from the first", 3, "/dev/xvda"))?;
    ensure_eq!(pod.output(&second, &get(14, 3, "/dev/shared"))?, "from the first", "what the other has written");
    ensure_eq!(pod.output(&second, "blockdev --getsize64 /dev/own")?, "3145728\n", "the size of the other");
    let foreign =
        "mknod /dev/x b $(cat /sys/block/vda/dev | tr : ' ') && ! dd if=/dev/x of=/dev/null count=1 2>/dev/null";
    if env.kind == Kind::Bulkhead {
        pod.output(&none, foreign)?;
    }

    // It goes with the last container that has it, and can come again.
    end(&pod, &first)?;
    ensure_eq!(pod.output(&second, &get(14, 3, "/dev/shared"))?, "from the first", "what is left to the other");
    pod.output(&second, &put("own", 0, "/dev/own"))?;
    end(&pod, &second)?;
    ensure_eq!(own.read(0, 3)?, b"own", "what a container has left");
    own.end()?;
    for round in 0..5 {
        let again = start(&pod, &format!("again{round}"), &[(&common, "/dev/xvda")])?;
        ensure_eq!(pod.output(&again, &get(14, 3, "/dev/xvda"))?, "from the first", "round {round}");
        end(&pod, &again)?;
    }
    common.end()?;
    pod.remove()?;
    kubelet.end()
}

/// Ends a container and removes it.
fn end(pod: &Pod<'_>, id: &str) -> Result {
    pod.stop(id, 30)?;
    pod.remove_container(id)
}

fn volumes_beyond_a_pods_room(env: &Env) -> Result {
    env.only_bulkhead()?;
    let devices = (0..5).map(|_| LoopDevice::new(env, MIB)).collect::<Result<Vec<_>>>()?;
    let names: Vec<String> = (0..5).map(|n| format!("/dev/xvd{n}")).collect();
    let volumes: Vec<(&LoopDevice, &str)> = devices.iter().zip(names.iter().map(String::as_str)).collect();
    let kubelet = Kubelet::new(env)?;
    let pod = kubelet.pod("room")?;

    let refused = start(&pod, "five", &volumes);
    let Err(crate::failure::Failure::Failed(why)) = refused else { fail!("five volumes: {refused:?}") };
    ensure!(why.contains("/dev/xvd4: the pod has 4 block devices"), "five volumes are refused by {why}");
    // Nothing is left of those that there was room for.
    let four = start(&pod, "four", &volumes[..4])?;
    pod.output(&four, "for n in 0 1 2 3; do blockdev --getsize64 /dev/xvd$n || exit; done")?;
    end(&pod, &four)?;
    devices.into_iter().try_for_each(LoopDevice::end)?;
    pod.remove()?;
    kubelet.end()
}
