//! `genie hugepages`: what huge pages there are, and reserving more until the next boot.
//!
//! What `reserve` adds is written down in [`GRANTS`], a file that only root may
//! write, so that `release` gives back exactly that, from whichever process.

use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Subcommand;
use genie_hugepages::{
    Grant, PageSize, ParsePageSizeError, ReleaseError, Released, Reservation, ReserveError, Root,
    Survey, SurveyError,
};
use serde::Serialize;

use super::{CommandError, print};
use crate::units::show_bytes;

/// Where reservations are written down: emptied by a boot, as the pools are.
const GRANTS: &str = "/run/genie-hugepages/grants.json";

/// `open(2)`; the same on every architecture that this builds for but a few old ones.
const O_NOFOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

/// What to do about huge pages.
#[derive(Debug, Subcommand)]
pub(super) enum HugepagesCommand {
    /// Show pools, limits and what was reserved
    Status,
    /// Add pages to the kernel's pools until the next boot or `release`; needs root
    Reserve {
        /// How many of which size, on which NUMA node: 2M:512 or 1G@0:4
        #[arg(required = true, value_name = "SIZE[@NODE]:PAGES")]
        wishes: Vec<Wish>,
    },
    /// Give back everything that `reserve` added, and no more; needs root
    Release,
}

/// Pages to be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    size: PageSize,
    node: Option<u32>,
    pages: u64,
}

/// Why pages could not be shown, reserved or given back.
#[derive(Debug, thiserror::Error)]
pub(super) enum HugepagesError {
    #[error(transparent)]
    Survey(#[from] SurveyError),
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    #[error(transparent)]
    Release(#[from] ReleaseError),
    #[error("cannot {action} {}, where reservations are written down: {source}; run as root", path.display())]
    Grants {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{} could have been written by others than root: look at what it says, \
         remove it, and reserve again", .0.display()
    )]
    Untrusted(PathBuf),
    #[error(
        "nothing is reserved: 'genie hugepages reserve' writes what it adds to {}; \
         pages added otherwise are given back the way they were added", .0.display()
    )]
    Nothing(PathBuf),
}

/// Why a wish was not understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum WishError {
    #[error("'{0}' is not SIZE[@NODE]:PAGES, such as 2M:512 or 1G@0:4")]
    Form(String),
    #[error(transparent)]
    Size(#[from] ParsePageSizeError),
}

/// What `status` prints.
#[derive(Debug, Serialize)]
struct Picture {
    #[serde(flatten)]
    survey: Survey,
    reserved: Vec<Grant>,
}

/// What `reserve` prints.
#[derive(Debug, Serialize)]
struct Added {
    added: Vec<Grant>,
}

/// What `release` prints.
#[derive(Debug, Default, Serialize)]
struct GivenBack {
    freed: u64,
    in_use: u64,
    missing: u64,
}

pub(super) fn run(command: HugepagesCommand, json: bool) -> Result<(), CommandError> {
    let root = Root::system();
    let grants = Path::new(GRANTS);
    match command {
        HugepagesCommand::Status => {
            let survey = genie_hugepages::survey(&root).map_err(HugepagesError::from)?;
            let reserved = match File::open(grants) {
                Ok(_) => Grants::open(grants, false)?.list,
                Err(_) => Vec::new(),
            };
            let picture = Picture { survey, reserved };
            print(json, &picture, || show(&picture))
        }
        HugepagesCommand::Reserve { wishes } => {
            let added = reserve(&root, grants, &wishes)?;
            let text = || added.iter().map(|grant| line("added", grant)).collect();
            print(
                json,
                &Added {
                    added: added.clone(),
                },
                text,
            )
        }
        HugepagesCommand::Release => {
            let given = release(&root, grants)?;
            print(json, &given, || show_given(&given))
        }
    }
}

/// Reserves all wishes or none.
fn reserve(root: &Root, path: &Path, wishes: &[Wish]) -> Result<Vec<Grant>, HugepagesError> {
    // Before the pools are touched: a grant that cannot be kept is not made.
    let mut grants = Grants::open(path, true)?;
    let mut reserved = Vec::new();
    for wish in wishes {
        reserved.push(genie_hugepages::reserve(
            root, wish.size, wish.pages, wish.node,
        )?);
    }
    let added: Vec<Grant> = reserved.iter().map(|one| one.grant().clone()).collect();
    grants.list.extend(added.iter().cloned());
    grants.write()?;
    for reservation in reserved {
        let _written_down = reservation.keep();
    }
    Ok(added)
}

fn release(root: &Root, path: &Path) -> Result<GivenBack, HugepagesError> {
    if !path.exists() {
        return Err(HugepagesError::Nothing(path.to_owned()));
    }
    let mut grants = Grants::open(path, true)?;
    if grants.list.is_empty() {
        return Err(HugepagesError::Nothing(path.to_owned()));
    }
    let mut given = GivenBack::default();
    while let Some(grant) = grants.list.pop() {
        let adopted = Reservation::adopt(root, grant.clone());
        match adopted.release() {
            Ok(Released {
                freed,
                in_use,
                missing,
            }) => {
                given.freed += freed;
                given.in_use += in_use;
                given.missing += missing;
            }
            Err(error) => return Err(error.into()),
        }
        grants.write()?;
    }
    Ok(given)
}

/// The file of reservations, open and locked.
struct Grants {
    path: PathBuf,
    list: Vec<Grant>,
    file: File,
}

impl Grants {
    /// Opens the file; makes it if it is to be written.
    fn open(path: &Path, write: bool) -> Result<Self, HugepagesError> {
        let failed = |action| {
            move |source| HugepagesError::Grants {
                action,
                path: path.to_owned(),
                source,
            }
        };
        if write && let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed("make"))?;
        }
        let file = File::options()
            .read(true)
            .write(write)
            .create(write)
            .mode(0o644)
            .custom_flags(O_NOFOLLOW)
            .open(path)
            .map_err(failed("open"))?;
        if write {
            file.lock().map_err(failed("lock"))?;
        }
        let stat = file.metadata().map_err(failed("read"))?;
        let owners = [0, rustix::process::geteuid().as_raw()];
        if !owners.contains(&stat.uid()) || stat.permissions().mode() & 0o022 != 0 {
            return Err(HugepagesError::Untrusted(path.to_owned()));
        }
        let text = io::read_to_string(&file).map_err(failed("read"))?;
        let list = if text.is_empty() {
            Vec::new()
        } else {
            serde_json::from_str(&text).map_err(|error| failed("read")(error.into()))?
        };
        Ok(Self {
            path: path.to_owned(),
            list,
            file,
        })
    }

    /// Writes the list in place: the file itself is the lock. A crash in
    /// between leaves a file that cannot be read, not a wrong one.
    fn write(&mut self) -> Result<(), HugepagesError> {
        let text = serde_json::to_vec(&self.list).expect("grants are plain data");
        let rewrite = || {
            self.file.set_permissions(Permissions::from_mode(0o644))?;
            self.file.set_len(0)?;
            io::Seek::rewind(&mut &self.file)?;
            (&self.file).write_all(&text)?;
            self.file.sync_all()
        };
        rewrite().map_err(|source| HugepagesError::Grants {
            action: "write",
            path: self.path.clone(),
            source,
        })
    }
}

impl FromStr for Wish {
    type Err = WishError;

    fn from_str(text: &str) -> Result<Self, WishError> {
        let form = || WishError::Form(text.to_owned());
        let (place, pages) = text.split_once(':').ok_or_else(form)?;
        let (size, node) = match place.split_once('@') {
            Some((size, node)) => (size, Some(node.parse().map_err(|_| form())?)),
            None => (place, None),
        };
        let pages = pages.parse().ok().filter(|pages| *pages > 0);
        Ok(Self {
            size: size.parse()?,
            node,
            pages: pages.ok_or_else(form)?,
        })
    }
}

fn line(verb: &str, grant: &Grant) -> String {
    let mut text = format!("{verb} {} pages of {}", grant.pages(), grant.size);
    for (node, pages) in &grant.shares {
        if let Some(node) = node {
            text += &format!(", {pages} on node {node}");
        }
    }
    text + "\n"
}

fn show_given(given: &GivenBack) -> String {
    let mut text = format!("gave back {} pages\n", given.freed);
    if given.in_use > 0 {
        text += &format!(
            "  {} more are in use and go when their users let go\n",
            given.in_use
        );
    }
    if given.missing > 0 {
        text += &format!("  {} had been taken out by somebody else\n", given.missing);
    }
    text
}

fn show(picture: &Picture) -> String {
    let survey = &picture.survey;
    let mut text = String::new();
    let mut say = |line: String| {
        writeln!(text, "{line}").expect("writing to a string cannot fail");
    };
    if survey.pools.is_empty() {
        say("this kernel has no huge pages".to_owned());
    }
    for pool in &survey.pools {
        say(format!(
            "{}: {} pages ({}), {} free, {} of them promised, {} surplus",
            pool.size,
            pool.total,
            show_bytes(pool.total * pool.size.bytes()),
            pool.free,
            pool.promised,
            pool.surplus
        ));
        // One node has nothing to add.
        for node in pool.nodes.iter().filter(|_| pool.nodes.len() > 1) {
            say(format!(
                "  node {}: {} pages, {} free",
                node.node, node.total, node.free
            ));
        }
    }
    for mount in &survey.mounts {
        let size = mount
            .size
            .map_or("default size".to_owned(), |size| size.to_string());
        say(format!("hugetlbfs: {} ({size})", mount.path.display()));
    }
    for limit in &survey.cgroups {
        say(format!(
            "control group: {} of {} used on pages of {} ({})",
            show_bytes(limit.used_bytes),
            show_bytes(limit.max_bytes),
            limit.size,
            limit.file.display()
        ));
    }
    if let Some(memlock) = &survey.memlock {
        let limit = memlock
            .soft_bytes
            .map_or("unlimited".to_owned(), show_bytes);
        say(format!("locked memory: {limit}"));
    }
    say(format!(
        "transparent huge pages: {}",
        format!("{:?}", survey.transparent).to_lowercase()
    ));
    match &picture.reserved[..] {
        [] => say("nothing reserved by 'genie hugepages reserve'".to_owned()),
        grants => {
            for grant in grants {
                say(line("reserved", grant).trim_end().to_owned());
            }
            say("  give back with 'genie hugepages release'".to_owned());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        let parse = |text: &str| {
            text.parse::<Wish>()
                .map(|w| (w.size.bytes(), w.node, w.pages))
                .ok()
        };
        assert_eq!(parse("2M:512"), Some((2 << 20, None, 512)));
        assert_eq!(parse("1G@0:4"), Some((1 << 30, Some(0), 4)));
        for bad in [
            "", "2M", "2M:", "2M:0", "2M:-1", "2M@:1", "2M@x:1", "3M:1", "x:1",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_grant_survives_in_its_file_and_is_locked_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("below/grants.json");
        let grant = Grant {
            size: PageSize::MB_2,
            shares: vec![(Some(0), 3)],
        };
        let mut grants = Grants::open(&path, true).unwrap();
        grants.list.push(grant.clone());
        grants.write().unwrap();
        assert!(File::open(&path).unwrap().try_lock().is_err());
        drop(grants);
        assert_eq!(Grants::open(&path, true).unwrap().list, [grant]);
    }

    #[test]
    fn a_file_that_others_may_write_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grants.json");
        fs::write(&path, "[]").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(
            Grants::open(&path, true),
            Err(HugepagesError::Untrusted(_))
        ));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(
            Grants::open(&link, true),
            Err(HugepagesError::Grants { .. })
        ));
    }

    #[test]
    fn release_without_a_reservation_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("grants.json");
        let refused = release(&Root::system(), &path);
        assert!(matches!(refused, Err(HugepagesError::Nothing(_))));
        assert!(!path.exists());
    }
}
