// SPDX-License-Identifier: Apache-2.0
//! Containers in network namespaces that somebody else has set up, as engines do.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::json;

use super::{Case, case};
use crate::bundle::Bundle;
use crate::env::Env;
use crate::failure::{Context as _, Result, ensure, ensure_eq, fail};

pub(super) const CASES: &[Case] = &[
    case!(what_the_namespace_has_the_guest_has),
    case!(both_ways_over_tcp_and_udp),
    case!(large_frames),
    case!(much_data_unchanged),
    case!(several_interfaces),
    case!(changes_are_followed),
    case!(nothing_is_left),
    case!(namespace_deleted_under_a_running_machine),
    case!(refusals),
];

/// Runs `ip` or another tool of the host's network and returns what it prints.
pub(super) fn host(command: &str) -> Result<String> {
    let mut words = command.split_whitespace();
    let Some(program) = words.next() else { fail!("an empty command") };
    let output = Command::new(program).args(words).output().context(|| format!("running {command}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command}: {}", error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A network namespace with a veth pair whose other end is in the host's. It is gone at the end.
pub(super) struct Namespace {
    /// A file that it is mounted on.
    pub(super) path: PathBuf,
    /// The end in the host's namespace.
    pub(super) host_end: String,
}

impl Namespace {
    pub(super) fn new(env: &Env, name: &str) -> Result<Self> {
        let namespace = Self::empty(env, name)?;
        let Self { path, host_end } = &namespace;
        host(&format!("ip link add {host_end} type veth peer name eth0 netns {}", path.display()))?;
        host(&format!("ip link set {host_end} up"))?;
        namespace.inside("ip link set eth0 up")?;
        Ok(namespace)
    }

    /// With a loopback interface, and nothing else yet.
    pub(super) fn empty(env: &Env, name: &str) -> Result<Self> {
        let path = env.folder(&format!("netns-{name}"))?.join("net");
        fs::write(&path, "")?;
        host(&format!("unshare --net={} true", path.display()))?;
        let namespace = Self { path, host_end: format!("bht-{name}") };
        namespace.inside("ip link set lo up")?;
        Ok(namespace)
    }

    /// Gives the host's end and `eth0` their addresses: 10.9.`net`.0/24 and fd09:`net`::/64, of which the host is number 1.
    pub(super) fn addresses(&self, host_end: &str, net: u8) -> Result {
        host(&format!("ip addr add 10.9.{net}.1/24 dev {host_end}"))?;
        host(&format!("ip addr add fd09:{net}::1/64 dev {host_end} nodad"))?;
        self.inside(&format!("ip addr add 10.9.{net}.2/24 dev eth0"))?;
        self.inside(&format!("ip addr add fd09:{net}::2/64 dev eth0 nodad")).map(drop)
    }

    /// With 10.9.`net`.0/24 and fd09:`net`::/64: the host is number 1, the container number 2.
    pub(super) fn with_addresses(self, net: u8) -> Result<Self> {
        self.addresses(&self.host_end, net)?;
        self.inside(&format!("ip route add default via 10.9.{net}.1 metric 77"))?;
        Ok(self)
    }

    /// Has a sysctl of `net` say something, as in `core.somaxconn=5`.
    pub(super) fn set(&self, setting: &str) -> Result {
        let argument = format!("net.{setting}");
        let inside = format!("--net={}", self.path.display());
        let set = Command::new("nsenter").args([&inside, "sysctl", "-qw", &argument]).status()?;
        ensure!(set.success(), "setting {argument}: {set}");
        Ok(())
    }

    pub(super) fn inside(&self, command: &str) -> Result<String> {
        host(&format!("nsenter --net={} {command}", self.path.display()))
    }

    /// Takes the name away; the namespace ends when nobody is in it.
    fn unmount(&self) -> Result {
        host(&format!("umount {}", self.path.display())).map(drop)
    }

    /// Gives a bundle this namespace, and the right to change its own network.
    pub(super) fn give_to(&self, bundle: &mut Bundle) {
        let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
        let network = namespaces.into_iter().flatten().find(|namespace| namespace["type"] == "network");
        if let Some(network) = network {
            network["path"] = json!(self.path);
        }
        for set in ["bounding", "effective", "permitted"] {
            if let Some(names) = bundle.spec["process"]["capabilities"][set].as_array_mut() {
                names.push(json!("CAP_NET_ADMIN"));
            }
        }
    }

    /// What a container leaves behind in it.
    pub(super) fn leftovers(&self) -> Result<String> {
        self.leftovers_of("eth0")
    }

    /// The same, if the interface is called otherwise.
    pub(super) fn leftovers_of(&self, interface: &str) -> Result<String> {
        let links = self.inside("ip -o link")?;
        let taps = links.lines().filter(|line| line.contains("bh-")).collect::<String>();
        let qdiscs = self.inside(&format!("tc qdisc show dev {interface} ingress"))?;
        Ok(taps + &qdiscs + &self.inside(&format!("tc filter show dev {interface} ingress"))?)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // One may have gone in the case, and the other with it.
        let _ = host(&format!("ip link del {}", self.host_end));
        let _ = self.unmount();
    }
}

/// A container in a namespace, of which the case looks at what only Bulkhead does.
pub(super) fn container(env: &Env, namespace: &Namespace, script: &str) -> Result<Bundle> {
    env.only_bulkhead()?;
    any_container(env, namespace, script)
}

/// A container in a namespace, of any runtime's.
pub(super) fn any_container(env: &Env, namespace: &Namespace, script: &str) -> Result<Bundle> {
    let mut bundle = Bundle::busybox(env)?;
    bundle.sh(script);
    namespace.give_to(&mut bundle);
    Ok(bundle)
}

fn what_the_namespace_has_the_guest_has(env: &Env) -> Result {
    let namespace = Namespace::new(env, "same")?.with_addresses(1)?;
    namespace.inside("ip route add 10.77.0.0/16 via 10.9.1.9 src 10.9.1.2")?;
    namespace.inside("ip -6 route add fd77::/48 via fd09:1::9 metric 5")?;
    namespace.inside("ip neigh add 10.9.1.200 lladdr 02:00:00:00:00:99 nud permanent dev eth0")?;
    namespace.inside("ip route add 10.78.0.0/16 dev eth0 scope link mtu 1300")?;
    namespace.inside("ip route add blackhole 10.66.0.0/16")?;
    namespace.inside("ip route add 10.79.0.0/16 nexthop via 10.9.1.7 nexthop via 10.9.1.8")?;
    namespace.inside("ip route add default via 10.9.1.5 table 1000")?;
    namespace.inside("ip rule add from 10.9.1.2 table 1000 priority 500")?;
    namespace.inside("ip addr add fe80::99/64 dev eth0 nodad")?;
    namespace.inside("ip addr add 10.99.1.1/32 dev lo")?;
    namespace.inside("ip addr add fd99::1/128 dev lo")?;
    namespace.inside("ip link set eth0 mtu 1400")?;
    let link = namespace.inside("ip -o link show dev eth0")?;
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap_or("none");
    let bundle = container(
        env,
        &namespace,
        "ip -o link show dev eth0; ip -o addr; ip route; ip -6 route; ip neigh; ip rule; ip route show table 1000; \
         cat /sys/class/net/eth0/address; ls /sys/class/net",
    )?;

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    output.expect_in_stdout(&["mtu 1400", "inet 10.9.1.2/24", "inet6 fd09:1::2/64"])?;
    for line in [
        "default via 10.9.1.1 dev eth0  metric 77",
        "10.77.0.0/16 via 10.9.1.9 dev eth0  src 10.9.1.2",
        "fd77::/48 via fd09:1::9 dev eth0  metric 5",
        "10.78.0.0/16 dev eth0 scope link",
        "blackhole 10.66.0.0/16",
        "10.79.0.0/16 via 10.9.1.7 dev eth0",
        "500:\tfrom 10.9.1.2 lookup 1000",
        "default via 10.9.1.5 dev eth0",
        "inet6 fe80::99/64",
        "lo    inet 10.99.1.1/32",
        "lo    inet6 fd99::1/128",
        "10.9.1.200 dev eth0 lladdr 02:00:00:00:00:99",
        mac,
    ] {
        ensure!(output.stdout().contains(line), "no {line:?}: {}", output.describe());
    }
    ensure!(output.stdout().ends_with("eth0\nlo\n"), "{}", output.describe());
    ensure!(output.stderr().contains("the route to 10.79.0.0/16 has several next hops"), "{}", output.describe());
    Ok(())
}

fn both_ways_over_tcp_and_udp(env: &Env) -> Result {
    let namespace = Namespace::new(env, "ways")?.with_addresses(2)?;
    let bundle = container(
        env,
        &namespace,
        "mkdir /www; echo from the guest >/www/index.html; httpd -p 80 -h /www; \
         ping -c 1 -w 5 10.9.2.1 && ping -6 -c 1 -w 5 fd09:2::1 && echo pings; \
         echo ready; read line; \
         wget -q -O - http://10.9.2.1:8080/index.html; wget -q -O - 'http://[fd09:2::1]:8080/index.html'; nslookup -type=a example.test 10.9.2.1",
    )?;
    let served = env.folder("served")?;
    fs::write(served.join("index.html"), "from the host\n")?;
    let mut server = Command::new("busybox")
        .args(["httpd", "-f", "-p", "8080", "-h"])
        .arg(&served)
        .spawn()
        .context(|| "starting httpd".to_owned())?;

    let result = (|| {
        let mut running = env.run(&bundle)?.open_stdin().spawn()?;
        running.wait_for("ready\n")?;
        for address in ["10.9.2.2", "[fd09:2::2]"] {
            ensure_eq!(host(&format!("busybox wget -q -O - http://{address}/"))?, "from the guest\n", "wget");
        }
        let socket = UdpSocket::bind("10.9.2.1:53")?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        running.write(b"\n")?;
        answer_name(&socket)?;
        let output = running.finish()?;
        output.expect_in_stdout(&["pings\n", "from the host\nfrom the host\n", "Address: 1.2.3.4\n"])
    })();
    server.kill()?;
    server.wait()?;
    result
}

/// Answers one question of the domain name system with the address 1.2.3.4.
pub(super) fn answer_name(socket: &UdpSocket) -> Result {
    let mut message = vec![0; 512];
    let (len, from) = socket.recv_from(&mut message).context(|| "waiting for a question".to_owned())?;
    message.truncate(len);
    socket.send_to(&answer_to(message), from)?;
    Ok(())
}

/// Such an answer to a question.
pub(super) fn answer_to(mut message: Vec<u8>) -> Vec<u8> {
    // It is an answer, with one record: to the question's name, of kind A and class IN, for 60 s, 4 bytes.
    message[2..4].copy_from_slice(&[0x81, 0x80]);
    message[6..8].copy_from_slice(&[0, 1]);
    message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 1, 2, 3, 4]);
    message
}

fn large_frames(env: &Env) -> Result {
    let namespace = Namespace::new(env, "jumbo")?.with_addresses(3)?;
    host(&format!("ip link set {} mtu 9000", namespace.host_end))?;
    namespace.inside("ip link set eth0 mtu 9000")?;
    let bundle = container(env, &namespace, "ping -c 3 -w 9 -s 8972 10.9.3.1; cat /sys/class/net/eth0/mtu")?;

    let output = env.run(&bundle)?.output()?;

    output.expect_in_stdout(&["3 packets received", "9000\n"])
}

fn much_data_unchanged(env: &Env) -> Result {
    const LEN: u64 = 16 << 20;
    let namespace = Namespace::new(env, "data")?.with_addresses(4)?;
    let bundle = container(env, &namespace, "nc -l -p 4000 -e cat & echo ready; wait")?;

    let mut running = env.run(&bundle)?.spawn()?;
    running.wait_for("ready\n")?;
    echo_unchanged("10.9.4.2:4000", LEN)?;
    running.finish()?.expect_stdout("ready\n")
}

/// Sends bytes to a server that sends back what it gets, and compares.
pub(super) fn echo_unchanged(address: &str, len: u64) -> Result {
    const PIECE: u64 = 8192;
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut sender = stream.try_clone()?;
    let sent = thread::spawn(move || -> io::Result<()> {
        for start in (0..len / 8).step_by(8192) {
            let piece: Vec<u8> = (start..start + PIECE).flat_map(scrambled).collect();
            sender.write_all(&piece)?;
        }
        sender.shutdown(Shutdown::Write)
    });
    let mut piece = vec![0; 64 << 10];
    for start in (0..len / 8).step_by(8192) {
        stream.read_exact(&mut piece).context(|| format!("reading back what lies at {}", start * 8))?;
        let expected: Vec<u8> = (start..start + PIECE).flat_map(scrambled).collect();
        ensure!(piece == expected, "what came back at {} differs", start * 8);
    }
    ensure!(matches!(sent.join(), Ok(Ok(()))), "not everything was sent");
    Ok(())
}

/// Connects to a server that may not listen quite yet.
pub(super) fn connect(address: &str) -> Result<TcpStream> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match TcpStream::connect(address) {
            Err(error) if is_early(&error) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(100));
            }
            result => return result.context(|| format!("connecting to {address}")),
        }
    }
}

/// Whether a server that is not there yet is the reason.
fn is_early(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::TimedOut)
}

/// Eight bytes of which none looks like another's.
pub(super) fn scrambled(number: u64) -> [u8; 8] {
    (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

fn several_interfaces(env: &Env) -> Result {
    let namespace = Namespace::new(env, "multi")?.with_addresses(6)?;
    let path = namespace.path.display();
    host(&format!("ip link add bht-multi2 type veth peer name net1 netns {path}"))?;
    host("ip link set bht-multi2 up")?;
    host("ip addr add 10.9.7.1/24 dev bht-multi2")?;
    // The names are the other way round than the guest's kernel gives them.
    namespace.inside("ip link set eth0 down")?;
    namespace.inside("ip link set eth0 name eth1")?;
    namespace.inside("ip link set eth1 up")?;
    namespace.inside("ip link set net1 name eth0")?;
    namespace.inside("ip link set eth0 up")?;
    namespace.inside("ip addr add 10.9.7.2/24 dev eth0")?;
    let bundle = container(env, &namespace, "ip -o -4 addr; ping -c 1 -w 9 10.9.7.1; ping -c 1 -w 9 10.9.6.1")?;

    let output = env.run(&bundle)?.output()?;

    output.expect_code(0)?;
    for line in ["eth0    inet 10.9.7.2/24", "eth1    inet 10.9.6.2/24"] {
        ensure!(output.stdout().contains(line), "no {line:?}: {}", output.describe());
    }
    Ok(())
}

fn changes_are_followed(env: &Env) -> Result {
    let namespace = Namespace::new(env, "later")?.with_addresses(16)?;
    let until =
        |what: &str, condition: &str| format!("until {condition}; do sleep 0.1; done; echo {what}; read line; ");
    let script = [
        "ip addr add 10.9.16.77/24 dev eth0; ip route add 10.70.0.0/16 via 10.9.16.1; echo ready; read line; ",
        &until("added", "ip addr | grep -q 10.9.16.7/24 && ip route | grep -q '^10.71.0.0/16 via 10.9.16.1'"),
        &until("removed", "! ip addr | grep -q 10.9.16.7/24 && ! ip route | grep -q 10.71"),
        &until("named", "ip addr show dev lo | grep -q 10.99.16.1/32"),
        &until("nameless", "! ip addr show dev lo | grep -q 10.99.16.1/32"),
        &until("smaller", "ip link show dev eth0 | grep -q 'mtu 1300'"),
        &until("down", "! ip link show dev eth0 | grep -q '[<,]UP'"),
        &until("up", "ip link show dev eth0 | grep -q '[<,]UP'"),
        "ip addr | grep -c 10.9.16.77; ping -c 1 -w 20 10.9.16.1 >/dev/null && echo reached",
    ];
    let bundle = container(env, &namespace, &script.concat())?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let steps: [(&str, &[&str]); 7] = [
        ("added", &["ip addr add 10.9.16.7/24 dev eth0", "ip route add 10.71.0.0/16 via 10.9.16.1 src 10.9.16.7"]),
        ("removed", &["ip route del 10.71.0.0/16", "ip addr del 10.9.16.7/24 dev eth0"]),
        ("named", &["ip addr add 10.99.16.1/32 dev lo"]),
        ("nameless", &["ip addr del 10.99.16.1/32 dev lo"]),
        ("smaller", &["ip link set eth0 mtu 1300"]),
        ("down", &["ip link set eth0 down"]),
        ("up", &["ip link set eth0 up"]),
    ];
    for (seen, commands) in steps {
        for command in commands {
            namespace.inside(command)?;
        }
        running.write(b"\n")?;
        running.wait_for(&format!("{seen}\n"))?;
    }
    running.write(b"\n")?;
    let output = running.finish()?;

    // What the container has made itself stays.
    output.expect_stdout("ready\nadded\nremoved\nnamed\nnameless\nsmaller\ndown\nup\n1\nreached\n")
}

fn nothing_is_left(env: &Env) -> Result {
    let namespace = Namespace::new(env, "left")?.with_addresses(8)?;
    let before = namespace.leftovers()?;
    let bundle = container(env, &namespace, "ping -c 1 -w 9 10.9.8.1 >/dev/null && echo reached; read line")?;
    for _ in 0..3 {
        env.run(&bundle)?.input(b"\n".to_vec()).output()?.expect_stdout("reached\n")?;
    }
    let mut killed = env.run(&bundle)?.open_stdin().spawn()?;
    killed.wait_for("reached\n")?;
    killed.signal(nix::sys::signal::Signal::SIGKILL)?;
    killed.finish()?;
    // The next one finds what that has left.
    env.run(&bundle)?.input(b"\n".to_vec()).output()?.expect_stdout("reached\n")?;

    let end = Instant::now() + Duration::from_secs(5);
    while namespace.leftovers()? != before && Instant::now() < end {
        thread::sleep(Duration::from_millis(50));
    }
    ensure_eq!(namespace.leftovers()?, before, "what is in the namespace");
    Ok(())
}

fn namespace_deleted_under_a_running_machine(env: &Env) -> Result {
    let namespace = Namespace::new(env, "gone")?.with_addresses(9)?;
    let bundle =
        container(env, &namespace, "echo ready; read line; ping -c 1 -w 1 10.9.9.1 >/dev/null 2>&1; echo end")?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    host(&format!("ip link del {}", namespace.host_end))?;
    namespace.unmount()?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nend\n")
}

fn refusals(env: &Env) -> Result {
    let namespace = Namespace::new(env, "no")?.with_addresses(10)?;
    let bundle = container(env, &namespace, "echo ready; read line; echo end")?;
    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    env.run(&bundle)?.output()?.expect_error(&["network namespace", "another virtual machine's"])?;
    running.write(b"\n")?;
    running.finish()?.expect_stdout("ready\nend\n")?;

    namespace.inside("ip link add gre1 type gre local 10.9.10.2 remote 10.9.10.1")?;
    namespace.inside("ip link set gre1 up")?;
    env.run(&bundle)?.output()?.expect_error(&["gre1", "possible are veth"])?;
    ensure_eq!(namespace.leftovers()?.contains("bh-"), false, "whether a tap is left");
    Ok(())
}
