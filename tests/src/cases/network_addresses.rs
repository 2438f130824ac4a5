// SPDX-License-Identifier: Apache-2.0
//! IPv6 addresses that another machine has too, and those that a router's word makes.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};

use super::network::{Namespace, any_container, container, host};
use super::{Case, case};
use crate::env::Env;
use crate::failure::{Result, ensure, ensure_eq};

pub(super) const CASES: &[Case] = &[
    case!(the_guest_finds_out_what_the_host_has_not),
    case!(an_address_of_another_machine_is_left_out),
    case!(addresses_that_a_router_announces),
    case!(an_interface_that_listens_to_no_router),
    case!(what_addresses_routes_and_rules_say_further),
];

/// How long the kernel may take for what it does by itself.
const LIMIT: Duration = Duration::from_secs(120);

/// Waits until a command's output holds a text, or no longer does.
fn wait_until(doing: &str, is_so: impl Fn() -> Result<bool>) -> Result {
    let end = Instant::now() + LIMIT;
    while !is_so()? {
        ensure!(Instant::now() < end, "{doing} takes too long");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// For shells: whether the address that ends so is listed with a word. Not for ever: a failure is to show.
const IS: &str = "is() { ip -o -6 addr show dev eth0 | grep ::$1/64 | grep -q $2; }; \
                  soon() { for i in $(seq 600); do is $1 $2 && return; sleep 0.1; done; }; ";

/// The host is still to find out when the interface is joined to a tap: the answers go to the guest.
fn the_guest_finds_out_what_the_host_has_not(env: &Env) -> Result {
    let namespace = Namespace::new(env, "dadg")?;
    // It asks a hundred times, for seconds.
    namespace.inside("sysctl -qw net.ipv6.conf.eth0.dad_transmits=300")?;
    namespace.inside("ip addr add fd09:70::2/64 dev eth0")?;
    namespace.inside("ip addr add fd09:70::3/64 dev eth0")?;
    let script = format!(
        "{IS} soon 2 dadfailed; is 2 dadfailed && echo another has it; \
         while is 3 tentative; do sleep 0.1; done; is 3 dadfailed || echo nobody has it"
    );
    let bundle = container(env, &namespace, &script)?;

    let running = env.run(&bundle)?.spawn()?;
    // An answer that comes before would be the host's.
    wait_until("joining a tap", || Ok(namespace.inside("tc filter show dev eth0 ingress")?.contains("mirred")))?;
    host(&format!("ip addr add fd09:70::2/64 dev {} nodad", namespace.host_end))?;

    running.finish()?.expect_stdout("another has it\nnobody has it\n")
}

fn an_address_of_another_machine_is_left_out(env: &Env) -> Result {
    let namespace = Namespace::new(env, "dadh")?.with_addresses(71)?;
    host(&format!("ip addr add fd09:71::7/64 dev {} nodad", namespace.host_end))?;
    namespace.inside("ip addr add fd09:71::7/64 dev eth0")?;
    wait_until("finding the other", || {
        Ok(namespace.inside("ip -o -6 addr show dev eth0 dadfailed")?.contains("::7/64"))
    })?;
    let bundle = container(env, &namespace, &format!("{IS} is 2 global && echo own; is 7 global || echo none"))?;

    let output = env.run(&bundle)?.output()?;

    output.expect_in_stdout(&["own\nnone\n"])?;
    let warning = "the address fd09:71::7/64 of eth0 is left out: another machine has it";
    ensure!(output.stderr().contains(warning), "{}", output.describe());
    Ok(())
}

/// A router on an interface of the host.
struct Router {
    socket: UdpSocket,
    index: u32,
}

impl Router {
    /// For it to be heard, the interface needs its own address first.
    fn new(interface: &str) -> Result<Self> {
        wait_until("an address for the router", || {
            let addresses = host(&format!("ip -o -6 addr show dev {interface} scope link"))?;
            Ok(addresses.contains("fe80:") && !addresses.contains("tentative"))
        })?;
        let protocol = Some(ipproto::ICMPV6);
        let socket: OwnedFd = socket_with(AddressFamily::INET6, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        sockopt::set_ipv6_multicast_hops(&socket, 255)?;
        Ok(Self { socket: socket.into(), index: if_nametoindex(interface)? })
    }

    /// Says to all that it is a router, and that hosts make themselves addresses in fd09:`net`::/64, good for so many seconds
    /// (RFC 4861, sections 4.2 and 4.6.2). The kernel adds the checksum.
    fn advertise(&self, net: u8, seconds: u32) -> Result {
        let prefix = format!("fd09:{net}::").parse::<Ipv6Addr>().map_err(std::io::Error::other)?;
        let message = [
            &[134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0][..],
            &seconds.to_be_bytes(),
            &seconds.to_be_bytes(),
            &[0; 4],
            &prefix.octets(),
        ];
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        self.socket.send_to(&message.concat(), SocketAddrV6::new(all_nodes, 0, 0, self.index))?;
        Ok(())
    }
}

/// The guest makes them, and keeps them when those of the host, which hears of the router no more, have come to their end.
fn addresses_that_a_router_announces(env: &Env) -> Result {
    let namespace = Namespace::new(env, "ra")?;
    let router = Router::new(&namespace.host_end)?;
    let hosts = || Ok(namespace.inside("ip -o -6 addr show dev eth0 dynamic")?.contains("fd09:72:"));
    wait_until("an address by the router", || router.advertise(72, 30).and_then(|()| hosts()))?;
    let own = "ip -o -6 addr show dev eth0 | grep fd09:72:";
    let script = format!(
        "echo ready; until {own} | grep -qv tentative && ip -6 route | grep -q '^default via fe80:'; do sleep 0.1; done; \
         echo heard; read line; until ip addr | grep -q 10.9.72.9; do sleep 0.1; done; {own} | wc -l"
    );
    let bundle = container(env, &namespace, &script)?;

    let mut running = env.run(&bundle)?.open_stdin().spawn()?;
    running.wait_for("ready\n")?;
    let is_heard = AtomicBool::new(false);
    thread::scope(|scope| {
        let advertising = scope.spawn(|| -> Result {
            while !is_heard.load(Ordering::Relaxed) {
                router.advertise(72, 3600)?;
                thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        });
        let heard = running.wait_for("heard\n");
        is_heard.store(true, Ordering::Relaxed);
        let advertised = advertising.join().unwrap_or(Ok(()));
        heard.and(advertised)
    })?;
    wait_until("the end of the host's address", || Ok(!hosts()?))?;
    // What the guest is told of by now, it was told of before this.
    namespace.inside("ip addr add 10.9.72.9/24 dev eth0")?;
    running.write(b"\n")?;

    running.finish()?.expect_stdout("ready\nheard\n1\n")
}

fn an_interface_that_listens_to_no_router(env: &Env) -> Result {
    let namespace = Namespace::new(env, "nora")?.with_addresses(73)?;
    for setting in ["accept_ra=0", "autoconf=0"] {
        namespace.inside(&format!("sysctl -qw net.ipv6.conf.eth0.{setting}"))?;
    }
    let settings = "cd /proc/sys/net/ipv6/conf/eth0; cat accept_ra autoconf disable_ipv6; ";
    let listening = container(env, &namespace, &format!("{settings} {IS} is 2 global && echo address"))?;
    env.run(&listening)?.output()?.expect_stdout("0\n0\n0\naddress\n")?;

    namespace.inside("sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1")?;
    let without = container(env, &namespace, &format!("{settings} ip -o -6 addr show dev eth0 | wc -l"))?;
    let output = env.run(&without)?.output()?;
    ensure_eq!(output.stdout(), "0\n0\n1\n0\n", "what the guest has without IPv6");
    Ok(())
}

/// Metrics, which of two addresses is used, and rules that share the priority of one that each namespace has.
fn what_addresses_routes_and_rules_say_further(env: &Env) -> Result {
    let namespace = Namespace::new(env, "say")?.with_addresses(99)?;
    for command in [
        "ip addr add 10.9.100.2/24 dev eth0 metric 300",
        "ip route add 10.78.0.0/16 dev eth0 scope link mtu 1300 advmss 1210",
        "ip addr add fd09:99::3/64 dev eth0 nodad",
        "ip rule add from 10.9.99.2 table 1000 priority 0",
        "ip rule add from 10.9.99.3 table 1000 priority 32766",
        "ip addr add 10.9.101.2/24 dev eth0",
        "ip route del 10.9.101.0/24 dev eth0",
    ] {
        namespace.inside(command)?;
    }
    let chosen = namespace.inside("ip -6 route get fd09:99::1")?;
    ensure!(chosen.contains("src fd09:99::3"), "what the host's kernel chooses: {chosen}");
    let script = "ip route; ip rule; ip -6 route get fd09:99::1; cat /proc/net/route";

    let output = env.run(&any_container(env, &namespace, script)?)?.output()?;

    let line = |begin: &str, part: &str| {
        let found = output.stdout().lines().any(|line| line.starts_with(begin) && line.contains(part));
        ensure!(found, "no line {begin:?} with {part:?}: {}", output.describe());
        Ok(())
    };
    output.expect_code(0)?;
    line("10.9.100.0/24 dev eth0 scope link", " metric 300")?;
    line("0:\tfrom 10.9.99.2 ", "lookup 1000")?;
    line("32766:\tfrom 10.9.99.3 ", "lookup 1000")?;
    line("32766:\tfrom all ", "lookup main")?;
    line("fd09:99::1 ", "src fd09:99::3")?;
    // There the largest segment shows as the MTU that it is for.
    line("eth0\t00004E0A\t", "\t1250\t")?;
    ensure!(!output.stdout().contains("10.9.101.0/24"), "a route that is gone: {}", output.describe());
    Ok(())
}
