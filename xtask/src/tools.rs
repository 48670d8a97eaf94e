//! Programs that must be on the machine, and how they get there.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

/// A program, and the package that has it on Debian, Ubuntu and most others.
pub struct Tool {
    pub program: &'static str,
    pub package: &'static str,
}

pub const IPTABLES: Tool = Tool { program: "iptables-restore", package: "iptables" };
pub const IPROUTE2: Tool = Tool { program: "ip", package: "iproute2" };
pub const CURL: Tool = Tool { program: "curl", package: "curl" };
pub const H2LOAD: Tool = Tool { program: "h2load", package: "nghttp2-client" };
pub const NETCAT: Tool = Tool { program: "nc", package: "netcat-openbsd" };
pub const PSQL: Tool = Tool { program: "psql", package: "postgresql-client" };
pub const RUNC: Tool = Tool { program: "runc", package: "runc" };
pub const CNI_PLUGINS: Tool = Tool { program: "/usr/lib/cni/ptp", package: "containernetworking-plugins" };
pub const NSENTER: Tool = Tool { program: "nsenter", package: "util-linux" };
pub const CA_CERTIFICATES: Tool = Tool { program: "update-ca-certificates", package: "ca-certificates" };
pub const IPERF3: Tool = Tool { program: "iperf3", package: "iperf3" };
pub const WRK: Tool = Tool { program: "wrk", package: "wrk" };
pub const HAPROXY: Tool = Tool { program: "haproxy", package: "haproxy" };
pub const PROMETHEUS: Tool = Tool { program: "prometheus", package: "prometheus" };
pub const NGINX: Tool = Tool { program: "nginx", package: "nginx" };

/// Installs what is missing where that is possible, else says what to type.
pub fn require(tools: &[&Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| find(tool.program).is_none()).map(|tool| tool.package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    let apt = find("apt-get");
    let (Some(apt), true) = (&apt, geteuid().is_root()) else {
        bail!("missing: {packages}. Type this, then start again:\n\n    {}\n", advice(apt.is_some(), &packages));
    };
    eprintln!("installing {packages}");
    let install = || apt_get(apt, &[&["install", "--yes", "--no-install-recommends"], &missing[..]].concat());
    // Package lists may be absent, as in a fresh container, or old.
    if install().is_err() {
        apt_get(apt, &["update"])?;
        install().with_context(|| format!("cannot install {packages}; type: apt-get install {packages}"))?;
    }
    Ok(())
}

/// Where a program is, also in the system directories that a user's PATH may lack.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|folder| folder.join(program)).find(|file| file.is_file())
}

fn advice(debian: bool, packages: &str) -> String {
    if debian {
        return format!("sudo apt-get install {packages}");
    }
    let manager = ["dnf", "zypper", "pacman", "apk"].into_iter().find(|name| find(name).is_some());
    // Fedora calls both packages otherwise.
    match manager {
        Some("dnf") => {
            format!("sudo dnf install {}", packages.replace("iptables", "iptables-nft").replace("iproute2", "iproute"))
        }
        Some("zypper") => format!("sudo zypper install {packages}"),
        Some("pacman") => format!("sudo pacman -S {packages}"),
        Some("apk") => format!("sudo apk add {packages}"),
        _ => format!("(your package manager) install {packages}"),
    }
}

fn apt_get(apt: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(apt);
    command.arg("--quiet").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    // A package that brings a service (nginx) leaves it alone: invoke-rc.d starts nothing in runlevel 1.
    command.env("RUNLEVEL", "1");
    // Standard output belongs to whoever asked for JSON.
    let output = command.stdin(Stdio::null()).output().context("cannot run apt-get")?;
    if !output.status.success() {
        bail!("apt-get {} failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
