//! The programs of a cluster, built from pinned and checksummed Go modules, once.
//!
//! Each folder of `xtask/cluster/programs` is a module whose `tool` lines name the programs. What was built lies in the
//! cache under a name that changes with the module, so that an old build is never taken for a new one.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::build::root;
use crate::image::digest;
use crate::style::dim;

/// Where the programs are.
pub struct Programs {
    kubernetes: PathBuf,
    etcd: PathBuf,
    containerd: PathBuf,
    coredns: PathBuf,
}

impl Programs {
    /// Builds what the cache lacks. Cold, on two cores, that takes minutes.
    pub fn get() -> Result<Self> {
        let lacking: Vec<_> = MODULES.iter().filter(|module| !module.is_built()).collect();
        if !lacking.is_empty() {
            check_go()?;
            let names = lacking.iter().map(|module| module.name).collect::<Vec<_>>().join(", ");
            eprintln!("building {names}: once, and minutes where nothing is cached");
        }
        for module in lacking {
            module.build()?;
        }
        let folder = |name: &str| MODULES.iter().find(|module| module.name == name).map(Module::folder);
        let known = "one of the modules below";
        Ok(Self {
            kubernetes: folder("kubernetes").context(known)?,
            etcd: folder("etcd").context(known)?,
            containerd: folder("containerd").context(known)?,
            coredns: folder("coredns").context(known)?,
        })
    }

    /// `kube-apiserver`, `kubelet`, `kubectl` and their like.
    pub fn kubernetes(&self, name: &str) -> PathBuf {
        self.kubernetes.join(name)
    }

    pub fn etcd(&self) -> PathBuf {
        self.etcd.join("server")
    }

    pub fn containerd(&self, name: &str) -> PathBuf {
        self.containerd.join(name)
    }

    pub fn coredns(&self) -> PathBuf {
        self.coredns.join("coredns")
    }

    /// Helm, which only some commands want.
    pub fn helm() -> Result<PathBuf> {
        Ok(HELM.on_demand()?.join("helm"))
    }

    /// Everything that a person or a node may call by its name.
    pub fn path(&self) -> String {
        let folders = [&self.kubernetes, &self.containerd].map(|folder| folder.display().to_string());
        format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", folders.join(":"))
    }
}

/// Pretends to be the kubelets of thousands of nodes.
pub fn kwok() -> Result<PathBuf> {
    Ok(KWOK.on_demand()?.join("kwok"))
}

/// Asks a server of HTTP/2 what its specification leaves no choice in.
pub fn h2spec() -> Result<PathBuf> {
    Ok(H2SPEC.on_demand()?.join("h2spec"))
}

/// Argo Rollouts: `rollouts-controller`, the plugin `gateway-api`, and `install.yaml`.
pub fn argo_rollouts() -> Result<PathBuf> {
    ARGO_ROLLOUTS.on_demand()
}

/// Flagger: `flagger`, and `kustomize`.
pub fn flagger() -> Result<PathBuf> {
    FLAGGER.on_demand()
}

/// The Gateway API: its kinds, its conformance suite, and what this applies first.
pub struct GatewayApi {
    /// A folder of CustomResourceDefinitions, those of the standard channel; beside it is `experimental`.
    pub kinds: PathBuf,
    pub suite: PathBuf,
    /// The suite's application: namespaces, Deployments, Services.
    pub application: PathBuf,
}

pub fn gateway_api() -> Result<GatewayApi> {
    let folder = CONFORMANCE.on_demand()?;
    Ok(GatewayApi {
        kinds: folder.join("standard"),
        suite: folder.join("conformance.test"),
        application: folder.join("manifests.yaml"),
    })
}

/// Where built programs are kept, outside the build tree: `$XDG_CACHE_HOME/selvedge/cluster`.
pub fn cache() -> PathBuf {
    let home = || env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    cache.unwrap_or_else(|| home().join(".cache")).join("selvedge/cluster")
}

/// One Go module with programs.
struct Module {
    name: &'static str,
    flags: &'static [&'static str],
    linker: &'static str,
    goal: Goal,
    /// What lies beside the programs: copies of files and folders of modules, by the module and the path in it.
    files: &'static [(&'static str, &'static str)],
}

/// What a module is built for.
enum Goal {
    /// The programs that its `tool` lines name.
    Tools,
    /// The tests of a package as one program.
    Tests { package: &'static str },
}

const MODULES: [Module; 4] = [
    Module {
        flags: &["-pgo=off"],
        // Without these, clients take the server for v0.0.0 and behave accordingly.
        linker: "-X k8s.io/component-base/version.gitVersion=v1.36.4 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36",
        ..Module::of_tools("kubernetes")
    },
    Module::of_tools("etcd"),
    Module { flags: &["-tags=no_btrfs,no_devmapper,no_zfs"], ..Module::of_tools("containerd") },
    Module::of_tools("coredns"),
];

const KWOK: Module = Module::of_tools("kwok");
const HELM: Module = Module::of_tools("helm");
const H2SPEC: Module = Module::of_tools("h2spec");
const ARGO_ROLLOUTS: Module = Module {
    files: &[("github.com/argoproj/argo-rollouts", "manifests/install.yaml")],
    ..Module::of_tools("argo-rollouts")
};
const FLAGGER: Module = Module { files: &[("github.com/fluxcd/flagger", "kustomize")], ..Module::of_tools("flagger") };
const CONFORMANCE: Module = Module {
    goal: Goal::Tests { package: "sigs.k8s.io/gateway-api/conformance" },
    files: &[
        ("sigs.k8s.io/gateway-api", "config/crd/standard"),
        ("sigs.k8s.io/gateway-api", "config/crd/experimental"),
        ("sigs.k8s.io/gateway-api/conformance", "mesh/manifests.yaml"),
    ],
    ..Module::of_tools("conformance")
};

impl Module {
    const fn of_tools(name: &'static str) -> Self {
        Self { name, flags: &[], linker: "", goal: Goal::Tools, files: &[] }
    }

    fn source(&self) -> PathBuf {
        root().join("xtask/cluster/programs").join(self.name)
    }

    /// Where its programs lie once they are built.
    fn folder(&self) -> PathBuf {
        let read = |file: &str| fs::read(self.source().join(file)).unwrap_or_default();
        let mut own = files_of(&self.source()).unwrap_or_default();
        own.retain(|file| file.extension().is_some_and(|extension| extension == "go"));
        own.sort();
        let own = own.iter().flat_map(|file| fs::read(file).unwrap_or_default()).collect();
        let files: String = self.files.iter().map(|(module, path)| format!("{module} {path}\n")).collect();
        let flags = self.flags.concat().into_bytes();
        let what = [read("go.mod"), read("go.sum"), flags, self.linker.into(), own, files.into()].concat();
        let key: String = digest(&what).chars().take(12).collect();
        cache().join(format!("{}-{}-{key}", self.name, env::consts::ARCH))
    }

    fn is_built(&self) -> bool {
        self.folder().is_dir()
    }

    /// The folder of what no cluster needs, built when somebody asks for it.
    fn on_demand(&self) -> Result<PathBuf> {
        if !self.is_built() {
            check_go()?;
            eprintln!("building {}: once, and minutes where nothing is cached", self.name);
            self.build()?;
        }
        Ok(self.folder())
    }

    fn build(&self) -> Result<()> {
        fs::create_dir_all(cache()).with_context(|| format!("cannot make {}", cache().display()))?;
        let lock = File::create(cache().join(format!("{}.lock", self.name)))?;
        // Somebody else may be at it; then this waits, and finds it done.
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        if self.is_built() {
            return Ok(());
        }
        let began = Instant::now();
        eprint!("  {} ... ", self.name);
        let place = cache().join(format!("{}.building", self.name));
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place)?;
        let (verb, what) = match &self.goal {
            Goal::Tools => (&["build"][..], "tool"),
            Goal::Tests { package } => (&["test", "-c"][..], *package),
        };
        let mut arguments: Vec<OsString> = verb.iter().map(OsString::from).collect();
        arguments.extend(["-mod=readonly", "-trimpath", "-buildvcs=false"].map(OsString::from));
        arguments.extend(self.flags.iter().map(OsString::from));
        arguments.extend([
            format!("-ldflags=-s -w {}", self.linker).into(),
            "-o".into(),
            place.clone().into(),
            what.into(),
        ]);
        self.go(&arguments)?;
        self.files.iter().try_for_each(|(module, path)| self.copy(module, path, &place))?;
        fs::rename(&place, self.folder()).with_context(|| format!("cannot put {} into the cache", self.name))?;
        self.remove_older()?;
        eprintln!("{}", dim(format!("{:.0} s", began.elapsed().as_secs_f64())));
        Ok(())
    }

    /// Copies a file, or a folder of files, out of the checked copy of a module that the build was made of.
    fn copy(&self, module: &str, path: &str, into: &Path) -> Result<()> {
        let at = self.go(&["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", module].map(OsString::from))?;
        let from = Path::new(at.trim()).join(path);
        for file in files_of(&from)? {
            let relative = file.strip_prefix(from.parent().unwrap_or(&from))?;
            let to = into.join(relative);
            fs::create_dir_all(to.parent().unwrap_or(into))?;
            // Its content alone: files of modules are read-only.
            let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
        }
        Ok(())
    }

    /// Runs go in the module, and returns what it prints.
    fn go(&self, arguments: &[OsString]) -> Result<String> {
        let mut command = Command::new("go");
        command.current_dir(self.source()).args(arguments).env("CGO_ENABLED", "0").env("GOWORK", "off");
        let output = command.stdin(Stdio::null()).output().context("cannot run go")?;
        if !output.status.success() {
            bail!("cannot build {}:\n{}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        String::from_utf8(output.stdout).context("go printed no text")
    }

    /// Builds of this module as it was before, which nobody asks for any more. One that was used of late stays: another
    /// tree of this project may stand at it.
    fn remove_older(&self) -> Result<()> {
        for entry in fs::read_dir(cache())? {
            let entry = entry?;
            let old = entry.metadata()?.modified()?.elapsed().is_ok_and(|age| age.as_secs() > KEPT_FOR_SECONDS);
            let of_this = entry.file_name().to_string_lossy().starts_with(&format!("{}-", self.name));
            if of_this && old && entry.path() != self.folder() {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

/// The files in a folder and all that are in it; of a file itself.
fn files_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let within = fs::read_dir(path)?.map(|entry| files_of(&entry?.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(within.concat())
}

fn check_go() -> Result<()> {
    let version = Command::new("go").arg("version").env("GOTOOLCHAIN", "local").output();
    let text = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let (major, minor) = GO;
    let held = parse_go_version(&text).is_some_and(|have| have >= GO);
    let have =
        if text.is_empty() { "there is no Go on the PATH".to_owned() } else { format!("here is {}", text.trim()) };
    let sudo = if geteuid().is_root() && env::var_os("SUDO_USER").is_some() {
        " (and keep your PATH under sudo: sudo env PATH=\"$PATH\" cargo xtask ...)"
    } else {
        ""
    };
    ensure!(
        held,
        "the cluster's programs are built with Go {major}.{minor} or later, and {have}. Install it from \
         https://go.dev/dl (unpack into /usr/local, put /usr/local/go/bin on the PATH){sudo}, then start again"
    );
    Ok(())
}

/// Reads `go version go1.26.8 linux/amd64`.
fn parse_go_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split(' ').find_map(|word| word.strip_prefix("go1."))?;
    let minor: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((1, minor.parse().ok()?))
}

const GO: (u32, u32) = (1, 26);
const KEPT_FOR_SECONDS: u64 = 30 * 24 * 3600;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_go_is_read() {
        assert_eq!(parse_go_version("go version go1.26.8 linux/amd64\n"), Some((1, 26)));
        assert_eq!(parse_go_version("go version go1.27rc1 linux/arm64"), Some((1, 27)));
        assert_eq!(parse_go_version(""), None);
    }

    #[test]
    fn every_module_is_there_with_its_checksums() {
        for module in MODULES.iter().chain([&KWOK, &HELM, &H2SPEC, &ARGO_ROLLOUTS, &FLAGGER, &CONFORMANCE]) {
            let go_mod = fs::read_to_string(module.source().join("go.mod")).unwrap();
            assert!(go_mod.contains("\ntool "), "{}: no tool lines", module.name);
            assert!(module.source().join("go.sum").is_file(), "{}: no go.sum", module.name);
        }
    }
}
